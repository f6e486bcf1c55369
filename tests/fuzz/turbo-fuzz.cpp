// Hostile input for all that reads bytes of strangers: blocks of the turbo types, the calibration in a file's metadata, and
// saved states of a context. tools/fuzz.py builds this with sanitizers, tests/test_fuzz.py without.
//
//     turbo-fuzz blocks|metadata|states [--seed S] [--first N] [--inputs N]
//
// An input is made of the seed and its number alone; what is wrong with one is printed with the arguments that repeat it.
// Prints a line of counts on standard output and how far it is on standard error. Exit code 0: nothing was found.

#include "cpu/turbo-cpu.h"
#include "fuzz.h"

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include <unistd.h>

// Reports end the process by SIGABRT, below. A gigabyte is more than any input can need.
extern "C" const char * __asan_default_options() {
    return "abort_on_error=1:max_allocation_size_mb=1024:detect_leaks=0";
}

extern "C" const char * __ubsan_default_options() {
    return "abort_on_error=1:print_stacktrace=1";
}

static const unsigned INPUT_SECONDS = 120; // no input takes a second

static const char * target_name;
static uint64_t     seed, current;

static void say_how_to_repeat() {
    char text[160];
    const int size = snprintf(text, sizeof(text), "to repeat it: turbo-fuzz %s --seed %llu --first %llu --inputs 1\n", target_name,
        (unsigned long long) seed, (unsigned long long) current);
    if (write(STDERR_FILENO, text, size) < 0) {
        _exit(3);
    }
}

static void died(int number) {
    say_how_to_repeat();
    signal(number, SIG_DFL);
    raise(number);
}

void expect(bool ok, const std::string & what) {
    if (!ok) {
        fprintf(stderr, "%s: %s\n", target_name, what.c_str());
        say_how_to_repeat();
        exit(1);
    }
}

static uint64_t number(const char * text) {
    char * end;
    errno = 0;
    const uint64_t value = strtoull(text, &end, 10);
    if (!*text || *text == '-' || *end || errno) {
        fprintf(stderr, "turbo-fuzz: '%s' is not a number\n", text);
        exit(2);
    }
    return value;
}

int main(int argc, char ** argv) {
    static const std::map<std::string, std::unique_ptr<fuzz_target> (*)()> targets = {
        { "blocks", fuzz_blocks }, { "metadata", fuzz_metadata }, { "states", fuzz_states },
    };
    std::map<std::string, uint64_t> options = { { "--seed", 1 }, { "--first", 0 }, { "--inputs", 1000 } };
    const auto found = targets.find(argc > 1 ? argv[1] : "");
    bool is_right = found != targets.end() && argc % 2 == 0;
    for (int i = 2; is_right && i < argc; i += 2) {
        is_right = options.count(argv[i]) > 0;
        if (is_right) {
            options[argv[i]] = number(argv[i + 1]);
        }
    }
    if (!is_right) {
        fprintf(stderr, "usage: turbo-fuzz blocks|metadata|states [--seed S] [--first N] [--inputs N]\n");
        return 2;
    }

    setenv("GGML_NO_BACKTRACE", "1", 1); // it would start a debugger
    signal(SIGABRT, died);
    signal(SIGALRM, died);
#ifndef __SANITIZE_ADDRESS__ // which reports them itself, and aborts
    signal(SIGSEGV, died);
    signal(SIGBUS, died);
    signal(SIGFPE, died);
    signal(SIGILL, died);
#endif

    target_name = found->first.c_str();
    seed        = options["--seed"];
    current     = options["--first"];
    const uint64_t inputs = options["--inputs"], end = current + inputs;
    const auto target = found->second();

    using clock = std::chrono::steady_clock;
    auto shown = clock::now();
    for (; current < end; ++current) {
        alarm(INPUT_SECONDS);
        fuzz_random random(seed, current);
        target->run(random);
        if (current % 64 == 0 && clock::now() - shown >= std::chrono::seconds(1)) {
            shown = clock::now();
            fprintf(stderr, "%s %llu/%llu\n", target_name, (unsigned long long) (current + inputs - end), (unsigned long long) inputs);
        }
    }
    alarm(0);
    printf("%s: %llu inputs, %s (%s)\n", target_name, (unsigned long long) inputs, target->summary().c_str(), turbo_cpu_simd());
    return 0;
}
