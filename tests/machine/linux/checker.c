/* checker MIB PACE: own MIB mebibytes of memory, write and check them for ever, and report each second.

   Word 0 of a page is its counter. Each pass over the memory raises it, and rewrites the words
   whose number has the same remainder as the counter when divided by TURNS. So each word has a value
   that follows from the page's number and its counter, and a page that is old, torn or of another
   place does not pass.

   PACE: pages a second at most, 0 for all that the processor can. */

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, TURNS = 16, STEP = 64 };

static int console;

static void say(const char *format, unsigned long long first, unsigned long long second)
{
    char line[200];
    int length = snprintf(line, sizeof line, format, first, second);
    if (write(console, line, length) != length)
        _exit(1);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ULL + time.tv_nsec;
}

/* What word `index` has since the counter was `counter`. */
static uint64_t value(uint64_t page, uint64_t counter, uint64_t index)
{
    return (page << 40 ^ counter << 9 ^ index) * 0x9e3779b97f4a7c15ULL;
}

static void set(uint64_t *words, uint64_t page, uint64_t counter)
{
    words[0] = counter;
    for (uint64_t index = counter % TURNS; index < WORDS; index += TURNS)
        if (index)
            words[index] = value(page, counter, index);
}

static int right(const uint64_t *words, uint64_t page, uint64_t counter)
{
    if (words[0] != counter)
        return 0;
    uint64_t last[TURNS]; /* the counter at which the words with this remainder were written */
    for (uint64_t turn = 0; turn < TURNS; turn++)
        last[turn] = counter - (counter - turn) % TURNS;
    for (uint64_t index = 1; index < WORDS; index++)
        if (words[index] != value(page, last[index % TURNS], index))
            return 0;
    return 1;
}

int main(int count, char **arguments)
{
    if (count != 3)
        return 2;
    uint64_t pages = strtoull(arguments[1], NULL, 10) << 8, pace = strtoull(arguments[2], NULL, 10);
    console = open("/dev/kmsg", O_WRONLY);
    uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (console < 0 || memory == MAP_FAILED)
        return 1;

    /* As if all turns had been: then each pass is like the next. */
    uint64_t counter = 0;
    for (; counter < TURNS; counter++)
        for (uint64_t page = 0; page < pages; page++)
            set(memory + page * WORDS, page, counter);
    counter--;

    uint64_t done = 0, wrong = 0, began = now(), reported = 0;
    for (;; counter++)
        for (uint64_t page = 0; page < pages; page++) {
            uint64_t *words = memory + page * WORDS;
            if (!right(words, page, counter)) {
                wrong++;
                say("checker: WRONG page %llu in pass %llu\n", page, counter);
            }
            set(words, page, counter + 1);
            if (++done % STEP)
                continue;
            uint64_t elapsed = now() - began;
            if (elapsed / 1000000000 > reported) {
                reported = elapsed / 1000000000;
                say("checker: %llu pages checked, %llu wrong\n", done, wrong);
            }
            if (pace && done * 1000000000 / pace > elapsed)
                usleep((done * 1000000000 / pace - elapsed) / 1000);
        }
}
