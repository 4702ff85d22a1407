/*
 * Runs a harness over a corpus without libFuzzer: each argument is a file with one input a line, in hex; "#" begins a
 * comment. A first argument "+N" has each input followed by N that differ from it, the same ones in each run. Prints
 * how many there were; the sanitizers' report of one that failed ends with its line and its bytes.
 */
#include <signal.h>

#include "harness.h"

#define LONGEST 4096

static char line[2 * LONGEST + 4096], where[1024];
static uint8_t input[2 * LONGEST];
static size_t input_size;
static uint64_t state = 1;
static unsigned long inputs;

static uint64_t any(void)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return state >> 33;
}

static void name_input(void)
{
    fprintf(stderr, "%s failed: ", where);
    for (size_t i = 0; i < input_size; i++)
        fprintf(stderr, "%02x", input[i]);
    fprintf(stderr, "\n");
}

static void on_abort(int sig)
{
    (void)sig; /* what did not hold has been said; abort() goes on to end the process */
    name_input();
}

static void run(void)
{
    uint8_t *data = malloc(input_size); /* of its exact size: reading on is a report */

    HOLDS(data);
    memcpy(data, input, input_size);
    LLVMFuzzerTestOneInput(data, input_size);
    free(data);
    inputs++;
}

static void change(void)
{
    for (uint64_t changes = 1 + any() % 4; changes; changes--) {
        size_t at = any() % input_size, size = any() % (input_size - at) + 1;

        switch (any() % 4) {
        case 0: input[at] ^= (uint8_t)(1u << any() % 8); break;
        case 1: input[at] = (uint8_t)any(); break;
        case 2: memmove(input + any() % (input_size - size + 1), input + at, size); break;
        default:
            if (input_size + size > LONGEST)
                break;
            memmove(input + at + size, input + at, input_size - at); /* a part twice */
            input_size += size;
            break;
        }
    }
}

static int digit(int c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool parse(void)
{
    size_t size = strcspn(line, " #\n") / 2;

    for (size_t at = 0; at < size; at++) {
        int high = digit(line[2 * at]), low = digit(line[2 * at + 1]);

        if (at >= LONGEST || high < 0 || low < 0)
            return false;
        input[at] = (uint8_t)(high << 4 | low);
    }
    input_size = size;
    return true;
}

int main(int argc, char **argv)
{
    bool more_of_each = argc > 1 && argv[1][0] == '+';
    unsigned long variants = more_of_each ? strtoul(argv[1] + 1, NULL, 10) : 0;

    __sanitizer_set_death_callback(name_input);
    signal(SIGABRT, on_abort);
    for (int i = more_of_each ? 2 : 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "r");

        if (!file) {
            perror(argv[i]);
            return 2;
        }
        for (unsigned number = 1; fgets(line, sizeof line, file); number++) {
            if (!parse()) {
                fprintf(stderr, "%s:%u: not an input of up to %d bytes in hex\n", argv[i], number, LONGEST);
                return 2;
            }
            if (!input_size)
                continue;
            snprintf(where, sizeof where, "%s:%u", argv[i], number);
            run();
            snprintf(where, sizeof where, "%s:%u, changed,", argv[i], number);
            for (unsigned long variant = 0; variant < variants; variant++) {
                parse();
                change();
                run();
            }
        }
        fclose(file);
    }
    printf("%lu\n", inputs);
    return 0;
}
