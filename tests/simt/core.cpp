#include "core.h"

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

namespace simt {

// ---- fibers: another stack and the registers that a call keeps; no system call ----

extern "C" void simt_switch(void ** from, void * to); // leaves its own stack pointer in *from
#if defined(__x86_64__)
asm(R"(
    .text
    .globl simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    retq
    .size simt_switch, . - simt_switch
)");
static void * new_stack(uint8_t * top, void (*entry)()) {
    void ** sp = (void **) top;
    *--sp = nullptr; // the address that entry, which never does, would return to: its stack is aligned as after a call
    *--sp = (void *) entry;
    for (int i = 0; i < 6; ++i) {
        *--sp = nullptr;
    }
    return sp;
}
#elif defined(__aarch64__)
asm(R"(
    .text
    .globl simt_switch
    .type simt_switch, %function
simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8,  d9,  [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8,  d9,  [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size simt_switch, . - simt_switch
)");
static void * new_stack(uint8_t * top, void (*entry)()) {
    void ** sp = (void **) (top - 160);
    memset(sp, 0, 160);
    sp[11] = (void *) entry;
    return sp;
}
#else
#error "simt_switch is written for x86-64 and AArch64"
#endif

struct meeting {
    unsigned arrived = 0, generation = 0;
    place    where{};
    std::vector<unsigned> who; // has arrived, if accesses are checked
    uint8_t  board[2][64][most_given]; // of even and odd generations: the next one may begin before all have read this
};

struct fiber {
    void *    stack_pointer;
    dim3      index;
    bool      done;
    meeting * waits;
    unsigned  generation; // that it waits for to end
    place     where;
};

built_in      current;
bool          checked;
access_counts counted;

namespace {

constexpr size_t stack_bytes = 256*1024;

size_t page_bytes() {
    return (size_t) sysconf(_SC_PAGESIZE);
}

// Memory that takes none before it is written.
uint8_t * map_pages(size_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *    pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (pages == MAP_FAILED) {
        fail("%zu bytes of memory cannot be had", bytes);
    }
    return (uint8_t *) pages;
}

// Of number i where there are `shape` of them, x fastest.
dim3 position(size_t i, dim3 shape) {
    return dim3((unsigned) (i % shape.x), (unsigned) (i/shape.x % shape.y), (unsigned) (i/shape.x/shape.y));
}

schedule     order = schedule::ascending;
std::mt19937 random_numbers;

std::vector<fiber>                           fibers;
std::vector<std::map<uint64_t, meeting>>     groups;
meeting                                      block_meeting;
uint8_t *                                    stacks;
size_t                                       n_stacks;
unsigned                                     self, live;
bool                                         running; // a fiber, not the scheduler
void *                                       scheduler;
const std::function<void()> *                kernel;

struct region {
    uint8_t * begin;
    size_t    bytes;
};
std::vector<region> dynamic_regions;
size_t              dynamic_used;

// Static shared variables are thread_local in the emulator: the thread-local storage of the program or library that
// this file is linked into holds them and, beside one byte, nothing else.
thread_local volatile char first_use; // a library's storage is there from the first use on

bool contains(const dl_phdr_info & object, const void * address) {
    for (int i = 0; i < object.dlpi_phnum; ++i) {
        const auto &    part  = object.dlpi_phdr[i];
        const uintptr_t begin = object.dlpi_addr + part.p_vaddr;
        if (part.p_type == PT_LOAD && (uintptr_t) address >= begin && (uintptr_t) address < begin + part.p_memsz) {
            return true;
        }
    }
    return false;
}

region static_region() {
    first_use = 0;
    region found{};
    dl_iterate_phdr([](dl_phdr_info * object, size_t, void * data) {
        if (!contains(*object, (const void *) simt_switch)) {
            return 0;
        }
        for (int i = 0; i < object->dlpi_phnum; ++i) {
            if (object->dlpi_phdr[i].p_type == PT_TLS && object->dlpi_tls_data) {
                *(region *) data = { (uint8_t *) object->dlpi_tls_data, object->dlpi_phdr[i].p_memsz };
            }
        }
        return 1;
    }, &found);
    return found;
}
region shared; // of the thread that launches

// ---- who accessed a byte, and what is known to have happened before what ----

// Every thread counts the meetings it was in. clocks[a*n + b] is the count of b up to which all that b did is known to
// be before what a does next: so an access of b at a later count races with one of a.
std::vector<uint32_t> clocks;

struct accessor {
    uint64_t block = 0; // which of all that were run, from 1 on
    uint32_t thread = 0, clock = 0;
};
struct byte_state {
    accessor writer, reader, other_reader;
    bool     written = false;
};
std::vector<byte_state> shared_states; // of the static region
uint64_t                first_block = 1, this_block = 0; // of this launch; running

struct array {
    uint8_t *   pages, * pages_end, * begin;
    size_t      bytes;
    const char * name;
    bool        writable;
    std::vector<byte_state> states;
};
std::vector<array> arrays;

void start_clocks(size_t n) {
    clocks.assign(n*n, 0);
    for (size_t i = 0; i < n; ++i) {
        clocks[i*n + i] = 1;
    }
}

// What one of them did before is before what any of them does after.
void order_accesses(const std::vector<unsigned> & who) {
    const size_t n = fibers.size();
    static std::vector<uint32_t> latest;
    latest.assign(n, 0);
    for (unsigned a : who) {
        for (size_t b = 0; b < n; ++b) {
            latest[b] = std::max(latest[b], clocks[a*n + b]);
        }
    }
    for (unsigned a : who) {
        std::copy(latest.begin(), latest.end(), clocks.begin() + (ptrdiff_t) (a*n));
        ++clocks[a*n + a];
    }
}

// "file:line" of an instruction, as binutils know it.
std::string source_of(const void * code) {
    struct object {
        const void * code;
        std::string  path;
        uintptr_t    base;
    } found{ code, "", 0 };
    dl_iterate_phdr([](dl_phdr_info * info, size_t, void * data) {
        object & o = *(object *) data;
        if (!contains(*info, o.code)) {
            return 0;
        }
        o.path = *info->dlpi_name ? info->dlpi_name : "/proc/" + std::to_string(getpid()) + "/exe";
        o.base = info->dlpi_addr;
        return 1;
    }, &found);
    char address[32], line[512] = "";
    snprintf(address, sizeof(address), "%#zx", (size_t) ((uintptr_t) code - 1 - found.base));
    if (FILE * pipe = popen(("addr2line -e " + found.path + " " + address).c_str(), "r")) {
        if (fgets(line, sizeof(line), pipe)) {
            line[strcspn(line, "\n")] = 0;
        }
        pclose(pipe);
    }
    return line;
}

bool is_before(const accessor & other) {
    if (other.block != this_block) {
        return other.block < first_block;
    }
    return clocks[self*fibers.size() + other.thread] >= other.clock;
}

[[noreturn]] void report_race(const char * what, const accessor & other, const char * before, const std::string & where,
                              const void * code) {
    if (other.block != this_block) {
        fail("race: %s %s, which another block %s, at %s", what, where.c_str(), before, source_of(code).c_str());
    }
    fail("race: %s %s, which thread %u %s without a barrier between, at %s", what, where.c_str(), other.thread, before,
         source_of(code).c_str());
}

// where: the name of byte i. of_block: the memory is new in every block.
void access_bytes(byte_state * states, size_t n, bool write, const std::function<std::string(size_t)> & where,
                  const void * code, bool of_block) {
    const accessor me = { this_block, self, clocks[self*fibers.size() + self] };
    for (size_t i = 0; i < n; ++i) {
        byte_state & s = states[i];
        if (of_block && s.writer.block != this_block) {
            s.writer  = {};
            s.written = false;
            if (s.reader.block != this_block) {
                s.reader = s.other_reader = {};
            }
        }
        if (!write && !s.written) {
            fail("reads %s, which nothing has written, at %s", where(i).c_str(), source_of(code).c_str());
        }
        if (!is_before(s.writer)) {
            report_race(write ? "writes" : "reads", s.writer, "wrote", where(i), code);
        }
        if (!write) {
            if (s.reader.thread != self || s.reader.block != this_block) {
                s.other_reader = s.reader;
            }
            s.reader = me;
            continue;
        }
        for (const accessor & r : { s.reader, s.other_reader }) {
            if (!is_before(r)) {
                report_race("writes", r, "read", where(i), code);
            }
        }
        s.writer  = me;
        s.written = true;
    }
}

// ---- shared memory ----

void poison_shared(size_t dynamic_bytes) {
    shared = static_region();
    memset(shared.begin, poison, shared.bytes);
    for (const region & r : dynamic_regions) {
        if (dynamic_bytes > r.bytes) {
            fail("%zu bytes of dynamic shared memory, and the variable has %zu", dynamic_bytes, r.bytes);
        }
    }
    dynamic_used = dynamic_bytes;
    if (checked) {
        shared_states.resize(shared.bytes);
    }
}

void end(meeting & m, bool ordered) {
    if (checked && ordered) {
        order_accesses(m.who);
    }
    m.who.clear();
    m.arrived = 0;
    ++m.generation;
}

void entry() {
    (*kernel)();
    fiber & me = fibers[self];
    me.done = true;
    --live;
    if (block_meeting.arrived && block_meeting.arrived == live) { // those that wait wait no longer for this one
        end(block_meeting, true);
    }
    void * unused;
    simt_switch(&unused, scheduler);
}

void wait(meeting & m, unsigned expected, bool ordered, place where) {
    fiber & me = fibers[self];
    if (m.arrived == 0) {
        m.where = where;
    } else if (m.where.line != where.line || strcmp(m.where.file, where.file) != 0) {
        me.where = where;
        fail("meets at %s:%u threads that are at %s:%u", where.file, where.line, m.where.file, m.where.line);
    }
    const unsigned generation = m.generation;
    if (checked) {
        m.who.push_back(self);
    }
    if (++m.arrived == expected) {
        end(m, ordered);
        return;
    }
    me.waits      = &m;
    me.generation = generation;
    me.where      = where;
    const built_in mine = current;
    running = false;
    simt_switch(&me.stack_pointer, scheduler);
    current  = mine;
    me.waits = nullptr;
}

void run_block() {
    const unsigned n = (unsigned) fibers.size();
    std::vector<unsigned> queue(n);
    for (unsigned i = 0; i < n; ++i) {
        queue[i] = order == schedule::descending ? n - 1 - i : i;
    }
    while (live > 0) {
        if (order == schedule::shuffled) {
            std::shuffle(queue.begin(), queue.end(), random_numbers);
        }
        bool went_on = false;
        for (unsigned i : queue) {
            fiber & f = fibers[i];
            if (f.done || (f.waits && f.waits->generation == f.generation)) {
                continue;
            }
            went_on = true;
            self = i;
            current.thread_index = f.index;
            running = true;
            simt_switch(&scheduler, f.stack_pointer);
            running = false;
        }
        if (!went_on) {
            std::map<std::pair<std::string, unsigned>, unsigned> waiting;
            for (const fiber & f : fibers) {
                if (!f.done) {
                    ++waiting[{ f.where.file, f.where.line }];
                }
            }
            for (const auto & [where, threads] : waiting) {
                fprintf(stderr, "simt: %u threads wait in vain at %s:%u\n", threads, where.first.c_str(), where.second);
            }
            fail("deadlock: %u of %u threads have not ended", live, n);
        }
    }
}

void fault(int signal, siginfo_t * info, void *) {
    if (signal == SIGILL) { // of -fsanitize-trap=alignment
        fail("accesses memory that is not aligned as its type wants");
    }
    const uint8_t * at = (const uint8_t *) info->si_addr;
    for (const array & a : arrays) {
        if (at >= a.pages && at < a.pages_end) {
            const bool inside = at >= a.begin && at < a.begin + a.bytes;
            fail("%s byte %td of an %s of %zu bytes", inside ? "writes" : "accesses", at - a.begin, a.name, a.bytes);
        }
    }
    if (at >= stacks && at < stacks + n_stacks*stack_bytes) {
        fail("needs more than %zu bytes of stack", stack_bytes - page_bytes());
    }
    fail("accesses address %p, which no memory of the device has", (const void *) at);
}

void handle_faults() {
    static bool done;
    if (done) {
        return;
    }
    done = true;
    static uint8_t stack[64*1024];
    stack_t        alternative{};
    alternative.ss_sp   = stack;
    alternative.ss_size = sizeof(stack);
    sigaltstack(&alternative, nullptr);
    struct sigaction action{};
    action.sa_sigaction = fault;
    action.sa_flags     = SA_SIGINFO | SA_ONSTACK;
    for (int signal : { SIGSEGV, SIGBUS, SIGILL }) {
        sigaction(signal, &action, nullptr);
    }
}

} // namespace

void fail(const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "simt: ");
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    if (running) {
        const built_in & c = current;
        fprintf(stderr, " (thread %u,%u,%u of block %u,%u,%u)", c.thread_index.x, c.thread_index.y, c.thread_index.z,
                c.block_index.x, c.block_index.y, c.block_index.z);
    }
    fprintf(stderr, "\n");
    fflush(nullptr);
    _Exit(70);
}

unsigned thread_number() {
    return self;
}

uint64_t live_lanes() {
    const size_t first = self/group_size*group_size;
    uint64_t     lanes = 0;
    for (size_t i = first; i < std::min<size_t>(first + group_size, fibers.size()); ++i) {
        lanes |= (uint64_t) !fibers[i].done << (i - first);
    }
    return lanes;
}

void set_schedule(schedule how, unsigned seed) {
    order = how;
    random_numbers.seed(seed);
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> & f, bool in_order) {
    handle_faults();
    const unsigned n = block.x*block.y*block.z;
    if (n == 0 || n > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
        fail("a grid of %u,%u,%u blocks of %u,%u,%u threads cannot be launched", grid.x, grid.y, grid.z,
             block.x, block.y, block.z);
    }
    if (n > n_stacks) {
        if (stacks) {
            munmap(stacks, n_stacks*stack_bytes);
        }
        n_stacks = n;
        stacks = map_pages(n*stack_bytes);
        for (unsigned i = 0; i < n; ++i) {
            mprotect(stacks + i*stack_bytes, page_bytes(), PROT_NONE);
        }
    }
    kernel = &f;
    first_block = in_order ? this_block + 1 : first_block;
    fibers.resize(n);
    current.block_dim = block;
    current.grid_dim  = grid;
    std::vector<uint64_t> blocks((uint64_t) grid.x*grid.y*grid.z);
    for (size_t i = 0; i < blocks.size(); ++i) {
        blocks[i] = order == schedule::descending ? blocks.size() - 1 - i : i;
    }
    if (order == schedule::shuffled) {
        std::shuffle(blocks.begin(), blocks.end(), random_numbers);
    }
    for (uint64_t b : blocks) {
        current.block_index = position((size_t) b, grid);
        poison_shared(shared_bytes);
        groups.assign((n + group_size - 1)/group_size, {});
        block_meeting = {};
        live = n;
        ++this_block;
        if (checked) {
            start_clocks(n);
        }
        for (unsigned i = 0; i < n; ++i) {
            fibers[i] = { new_stack(stacks + (i + 1)*stack_bytes, entry), position(i, block), false, nullptr, 0, {} };
        }
        run_block();
    }
}

const uint8_t * meet(uint64_t mask, const void * given, size_t size, bool ordered, place where) {
    const unsigned lane = self % group_size;
    if (!(mask >> lane & 1)) {
        fail("lane %u is not in its own mask %08llx at %s:%u", lane, (unsigned long long) mask, where.file, where.line);
    }
    meeting & m = groups[self/group_size][mask];
    uint8_t (&board)[64][most_given] = m.board[m.generation & 1];
    if (size) {
        memcpy(board[lane], given, size);
    }
    wait(m, (unsigned) __builtin_popcountll(mask), ordered, where);
    return board[0];
}

void meet_block(place where) {
    wait(block_meeting, live, true, where);
}

// ---- checked accesses ----

void access(const void * address, size_t size, bool write, const void * code) {
    if (!running) {
        return; // the test itself
    }
    const uint8_t * at = (const uint8_t *) address;
    if (at >= shared.begin && at < shared.begin + shared.bytes) {
        for (const region & r : dynamic_regions) {
            if (at >= r.begin && at < r.begin + r.bytes && at + size > r.begin + dynamic_used) {
                fail("accesses byte %td of %zu bytes of dynamic shared memory, at %s", at - r.begin, dynamic_used,
                     source_of(code).c_str());
            }
        }
        ++(write ? counted.shared_writes : counted.shared_reads)[size <= 16 ? size : 0];
        const auto where = [](size_t) { return std::string("shared memory"); };
        access_bytes(&shared_states[(size_t) (at - shared.begin)], size, write, where, code, true);
        return;
    }
    for (array & a : arrays) {
        if (at < a.pages || at >= a.pages_end) {
            continue;
        }
        counted.array_reads[size <= 16 ? size : 0] += !write;
        const uint8_t * end = a.begin + a.bytes;
        // Words that hold bytes of the array may be read as a whole: no allocation of a device ends within one.
        const bool touches = (uintptr_t) at % size == 0 && size <= 4 && at < end && at + size > a.begin;
        if (!(at >= a.begin && at + size <= end) && (write || !touches)) {
            const ptrdiff_t first = at - a.begin;
            fail("%s bytes %td to %td of an %s of %zu bytes, at %s", write ? "writes" : "reads", first,
                 first + (ptrdiff_t) size - 1, a.name, a.bytes, source_of(code).c_str());
        }
        if (a.writable) {
            const uint8_t * from = std::max<const uint8_t *>(at, a.begin), * to = std::min(at + size, end);
            access_bytes(&a.states[(size_t) (from - a.begin)], (size_t) (to - from), write, [&](size_t i) {
                return "byte " + std::to_string((from - a.begin) + (ptrdiff_t) i) + " of an " + a.name;
            }, code, false);
        }
        return;
    }
}

void require_alignment(const void * address, size_t size, const void * code) {
    if (running && (uintptr_t) address % size != 0) {
        fail("accesses %zu bytes at an address that is no multiple of that, at %s", size, source_of(code).c_str());
    }
}

void access_atomic(const void * address, size_t size) {
    for (array & a : arrays) {
        const uint8_t * at = (const uint8_t *) address;
        if (checked && running && at >= a.begin && at + size <= a.begin + a.bytes) {
            for (size_t i = 0; i < size; ++i) {
                a.states[(size_t) (at - a.begin) + i].written = true;
            }
        }
    }
}

// ---- memory ----

dynamic_shared::dynamic_shared(void * data, size_t capacity) {
    dynamic_regions.push_back({ (uint8_t *) data, capacity });
}

memory::memory(size_t bytes, size_t alignment, bool writable, const char * name) : bytes(bytes), writable(writable) {
    handle_faults();
    const size_t page = page_bytes(), inner = (bytes + alignment + page - 1)/page*page;
    mapped = inner + 2*page;
    pages  = map_pages(mapped);
    mprotect(pages, page, PROT_NONE);
    mprotect(pages + page + inner, page, PROT_NONE);
    // the last place with this alignment, and with no better one
    uint8_t * end = pages + page + inner;
    begin = (uint8_t *) ((uintptr_t) (end - bytes)/alignment*alignment);
    if ((uintptr_t) begin % (2*alignment) == 0 && alignment < 16 && begin - alignment >= pages + page) {
        begin -= alignment;
    }
    memset(pages + page, poison, inner);
    std::vector<byte_state> states(checked && writable ? bytes : 0);
    arrays.push_back({ pages, pages + mapped, begin, bytes, name, writable, std::move(states) });
    if (!writable) {
        mprotect(pages + page, inner, PROT_READ);
    }
}

void memory::fill(const void * from) {
    const size_t page = page_bytes();
    mprotect(pages + page, mapped - 2*page, PROT_READ | PROT_WRITE);
    if (bytes) {
        memcpy(begin, from, bytes);
    }
    written(0, bytes);
    if (!writable) {
        mprotect(pages + page, mapped - 2*page, PROT_READ);
    }
}

void memory::written(size_t first, size_t n) {
    for (array & a : arrays) {
        if (a.pages == pages && !a.states.empty()) {
            for (size_t i = first; i < first + n; ++i) {
                a.states[i]         = {};
                a.states[i].written = true;
            }
        }
    }
}

memory::~memory() {
    const uint8_t * end = pages + mapped - page_bytes();
    for (const uint8_t * p = pages + page_bytes(); p < end; ++p) {
        if (*p != poison && (p < begin || p >= begin + bytes)) {
            fail("byte %td of an array of %zu bytes was written", p - begin, bytes);
        }
    }
    arrays.erase(std::find_if(arrays.begin(), arrays.end(), [&](const array & a) { return a.pages == pages; }));
    munmap(pages, mapped);
}

} // namespace simt
