/* Runs the tests of a group, each in a process of its own with a time limit, and prints KTAP one level down. */
#define _GNU_SOURCE
#include "sva.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define TEST_MS 40000 /* a hung test; the longest takes 5 s in a guest without acceleration */
#define KILL_MS 10000 /* from SIGKILL to the end: the driver must let a process go */
#define TEXT 400

static const struct sva_group *const groups[] = {
	&kernel_group, &memory_group,	&changes_group,	 &errors_group,
	&processes_group, &lifetime_group, &pressure_group, &pager_group, &ring_group, &requests_group, &timings_group,
};

static int ended(int pidfd, int ms)
{
	struct pollfd wait = { .fd = pidfd, .events = POLLIN };

	return poll(&wait, 1, ms) == 1;
}

/* What the test printed, on one line and without what KTAP gives a meaning. */
static void read_text(int fd, char *text)
{
	size_t have = 0;
	ssize_t got;

	while ((got = read(fd, text + have, TEXT - 1 - have)) > 0)
		have += (size_t)got;
	while (have && text[have - 1] == '\n')
		have--;
	text[have] = '\0';
	for (char *at = text; *at; at++) {
		if (*at == '\n')
			*at = ';';
		else if (*at == '#' || *at < ' ')
			*at = '.';
	}
}

static int run_test(const struct sva_test *test, char *text)
{
	int pipes[2], status, pidfd;
	pid_t pid;

	if (pipe2(pipes, O_CLOEXEC | O_NONBLOCK))
		give_up("pipe");
	pid = fork();
	if (pid < 0)
		give_up("fork");
	if (pid == 0) {
		setpgid(0, 0);
		dup2(pipes[1], STDOUT_FILENO);
		setvbuf(stdout, NULL, _IOLBF, 0);
		exit(test->run());
	}
	setpgid(pid, pid); /* whoever is first: what the test leaves behind ends with it */
	close(pipes[1]);
	pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	if (pidfd < 0)
		give_up("pidfd_open");
	text[0] = '\0';
	int in_time = ended(pidfd, TEST_MS);

	kill(-pid, SIGKILL);
	if (!in_time && !ended(pidfd, KILL_MS)) {
		snprintf(text, TEXT, "still running after %d s, and not to be killed", TEST_MS / 1000);
		status = FAIL << 8;
	} else {
		waitpid(pid, &status, 0);
		read_text(pipes[0], text);
	}
	close(pidfd);
	close(pipes[0]);
	if (!in_time) {
		if (!text[0])
			snprintf(text, TEXT, "not done after %d s", TEST_MS / 1000);
		return FAIL;
	}
	if (WIFEXITED(status))
		return WEXITSTATUS(status);
	snprintf(text, TEXT, "ended by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
	return ERROR;
}

static int run_group(const struct sva_group *group, const char *only)
{
	int failed = 0, skips = 0, number = 0;
	char text[TEXT];

	for (size_t i = 0; i < group->count; i++)
		number += !only || !strcmp(only, group->tests[i].name);
	printf("  KTAP version 1\n  1..%d\n", number);
	number = 0;
	for (size_t i = 0; i < group->count; i++) {
		const struct sva_test *test = &group->tests[i];

		if (only && strcmp(only, test->name))
			continue;
		fflush(stdout);
		int outcome = run_test(test, text);

		failed += outcome != PASS && outcome != SKIP;
		skips += outcome == SKIP;
		printf("  %s %d %s #%s%s%s\n", outcome == PASS || outcome == SKIP ? "ok" : "not ok", ++number, test->name,
		       outcome == SKIP ? " SKIP" : "", text[0] ? " " : "", text);
	}
	if (failed)
		return FAIL;
	return skips == number ? SKIP : PASS;
}

/* sva GROUP [TEST] */
int sva_main(int argc, char **argv)
{
	for (size_t i = 0; i < sizeof(groups) / sizeof(groups[0]); i++)
		if (!strcmp(argv[0], groups[i]->name))
			return run_group(groups[i], argc > 1 ? argv[1] : NULL);
	printf("%s is no group of tests\n", argv[0]);
	return USAGE;
}
