/* SIGBUS and SIGSEGV at announced addresses become return values; see guard.h. */
#include "guard.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#define PAGE_MASK_4K ((uintptr_t)4095)

static const int guarded_signals[] = {SIGBUS, SIGSEGV};
#define SIGNALS (sizeof guarded_signals / sizeof guarded_signals[0])

static struct sigaction previous[SIGNALS];
static volatile sig_atomic_t passed_on[SIGNALS];
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;

/* initial-exec: the handler must not allocate thread-local storage */
static __thread struct guard *volatile current __attribute__((tls_model("initial-exec")));

static int window_holds(const struct guard_window *window, uintptr_t address)
{
    uintptr_t first = window->first & ~PAGE_MASK_4K; /* the kernel may report the start of the page */
    uintptr_t end = window->first + window->size;

    return window->size && address >= first && address < end;
}

/*
 * Not ours: to whoever handled it before. A handler that only reports hands it on by raising it again, and may by then
 * have put us back in its place: so what was sent, not caused by an instruction, is passed on once.
 */
static void pass_on(size_t slot, int sig, siginfo_t *info, void *ucontext)
{
    const struct sigaction *old = &previous[slot];
    int sent = info->si_code <= 0;

    if (sent && old->sa_handler == SIG_IGN)
        return;
    if (old->sa_handler == SIG_DFL || old->sa_handler == SIG_IGN || (sent && passed_on[slot])) {
        signal(sig, SIG_DFL); /* an instruction at fault faults again on return */
        if (sent)
            raise(sig);
        return;
    }
    passed_on[slot] = 1;
    if (old->sa_flags & SA_SIGINFO)
        old->sa_sigaction(sig, info, ucontext);
    else
        old->sa_handler(sig);
}

static void on_signal(int sig, siginfo_t *info, void *ucontext)
{
    struct guard *guard = current;
    uintptr_t address = (uintptr_t)info->si_addr;

    if (guard && info->si_code > 0) { /* raised by the kernel, not sent by kill() */
        if (window_holds(&guard->memory, address))
            siglongjmp(guard->env, GUARD_MEMORY);
        if (window_holds(&guard->buffer, address))
            siglongjmp(guard->env, GUARD_BUFFER);
    }
    /*
     * Raised by this thread itself, which runs our code alone: so by a handler in front of ours that has reported the
     * fault and put us back. On return the instruction faults again, and then we are told where.
     */
    if (guard && info->si_code == SI_TKILL && info->si_pid == getpid() && !guard->raised) {
        guard->raised = 1;
        return;
    }
    pass_on(sig == SIGBUS ? 0 : 1, sig, info, ucontext);
}

int guard_install(void)
{
    int failed = 0;

    pthread_mutex_lock(&install_lock);
    for (size_t slot = 0; slot < SIGNALS; slot++) {
        struct sigaction now, ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK};

        if (sigaction(guarded_signals[slot], NULL, &now)) {
            failed = 1;
            continue;
        }
        if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_signal)
            continue;
        ours.sa_sigaction = on_signal;
        sigemptyset(&ours.sa_mask);
        previous[slot] = now;
        failed |= sigaction(guarded_signals[slot], &ours, NULL) != 0;
    }
    pthread_mutex_unlock(&install_lock);
    return failed ? -1 : 0;
}

int guard_run(struct guard *guard, int (*body)(struct guard *, void *), void *context, int *result)
{
    int lost = sigsetjmp(guard->env, 0); /* without the mask: saving it costs a system call */

    if (lost) {
        sigset_t set;

        current = NULL;
        sigemptyset(&set); /* left the handler by a jump: unblock what the kernel blocked for it */
        sigaddset(&set, SIGBUS);
        sigaddset(&set, SIGSEGV);
        pthread_sigmask(SIG_UNBLOCK, &set, NULL);
        return lost;
    }
    guard->memory.size = 0;
    guard->raised = 0;
    current = guard;
    *result = body(guard, context);
    current = NULL;
    return GUARD_OK;
}
