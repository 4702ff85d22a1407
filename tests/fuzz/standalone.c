/*
 * Runs a harness over a corpus without libFuzzer: each argument is a file with one input a line, in hex; "#" begins a
 * comment. Names the line before it runs, so that the last one named is the one that failed; prints how many there were.
 */
#include <ctype.h>

#include "harness.h"

#define LONGEST 65536

static int digit(int c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static char line[2 * LONGEST + 2], where[1024];

static void name_line(void)
{
    fprintf(stderr, "%s\n", where);
}

int main(int argc, char **argv)
{
    unsigned long inputs = 0;

    __sanitizer_set_death_callback(name_line);
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "r");

        if (!file) {
            perror(argv[i]);
            return 2;
        }
        for (unsigned number = 1; fgets(line, sizeof line, file); number++) {
            size_t size = strcspn(line, "#\n") / 2;
            uint8_t *data;

            if (!size)
                continue;
            data = malloc(size); /* of its exact size: reading on is a report */
            for (size_t at = 0; at < size; at++) {
                int high = digit(line[2 * at]), low = digit(line[2 * at + 1]);

                if (!data || high < 0 || low < 0) {
                    fprintf(stderr, "%s:%u: not hex\n", argv[i], number);
                    return 2;
                }
                data[at] = (uint8_t)(high << 4 | low);
            }
            snprintf(where, sizeof where, "%s:%u: this input failed", argv[i], number);
            LLVMFuzzerTestOneInput(data, size);
            free(data);
            inputs++;
        }
        fclose(file);
    }
    printf("%lu inputs\n", inputs);
    return 0;
}
