/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libdune for C. Made by cbindgen from libdune-c/src; `cargo run -p dune-header` makes it again.
 * Macros and inline functions are in the headers that it includes.
 */

#pragma once

#include "types.h"

/**
 * Called for each page of a walk; anything but 0 ends it.
 */
typedef int (*page_walk_cb)(const void *arg, ptent_t *ptep, void *va);

/**
 * Registers of interrupted code. What a handler leaves here is loaded.
 */
struct __attribute__((packed)) dune_tf {
        uint64_t rdi;
        uint64_t rsi;
        uint64_t rdx;
        /**
         * Of a system call: its fourth argument.
         */
        uint64_t rcx;
        uint64_t r8;
        uint64_t r9;
        uint64_t r10;
        uint64_t r11;
        uint64_t rbx;
        uint64_t rbp;
        uint64_t r12;
        uint64_t r13;
        uint64_t r14;
        uint64_t r15;
        /**
         * Number of a system call, then its result.
         */
        uint64_t rax;
        /**
         * Error code of an exception.
         */
        uint32_t err;
        uint32_t pad1;
        uint64_t rip;
        uint16_t cs;
        uint16_t pad2[3];
        uint64_t rflags;
        uint64_t rsp;
        uint16_t ss;
        uint16_t pad3[3];
};

/**
 * A handler of an exception or signal.
 */
typedef void (*dune_intr_cb)(struct dune_tf *tf);

/**
 * A handler of page faults; `fec` is the CPU's error code (FEC_*).
 */
typedef void (*dune_pgflt_cb)(uintptr_t addr, uint64_t fec, struct dune_tf *tf);

/**
 * A handler of system calls of CPL3.
 */
typedef void (*dune_syscall_cb)(struct dune_tf *tf);

/**
 * An ELF file that was opened.
 */
struct dune_elf {
        /**
         * The file, or -1.
         */
        int fd;
        /**
         * Its bytes.
         */
        uint8_t *mem;
        int len;
        Elf64_Ehdr hdr;
        /**
         * Copies of its program and section headers.
         */
        Elf64_Phdr *phdr;
        Elf64_Shdr *shdr;
        /**
         * Names of its sections; NULL where it has none.
         */
        char *shdrstr;
        /**
         * The program's.
         */
        void *priv;
};

/**
 * Called for each section header with its name and number; anything but 0 ends that.
 */
typedef int (*dune_elf_shcb)(struct dune_elf *elf, const char *sname, int snum, Elf64_Shdr *shdr);

/**
 * Called for each program header; anything but 0 ends that.
 */
typedef int (*dune_elf_phcb)(struct dune_elf *elf, Elf64_Phdr *phdr);

/**
 * A mapping of the process.
 */
struct dune_procmap_entry {
        uintptr_t begin;
        uintptr_t end;
        uint64_t offset;
        /**
         * Readable.
         */
        bool r;
        /**
         * Writable.
         */
        bool w;
        /**
         * Executable.
         */
        bool x;
        /**
         * Private, else shared.
         */
        bool p;
        /**
         * Its file, or what Linux calls it; "" where there is nothing. Only while the callback runs.
         */
        char *path;
        /**
         * `PROCMAP_TYPE_*`
         */
        int type;
};

/**
 * Called for each mapping.
 */
typedef void (*dune_procmap_cb)(const struct dune_procmap_entry *entry);

/**
 * Why a thread ends that cannot go on; see `on_dune_exit`.
 */
struct dune_config {
        /**
         * `DUNE_RET_*`
         */
        int64_t ret;
        /**
         * Basic exit reason or vector.
         */
        int64_t status;
        uint64_t vcpu;
        uint64_t rip;
        uint64_t rsp;
        uint64_t rflags;
        uint64_t cr3;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Prepares the process for Dune mode: the device, the default page table, the page pool. Once per process; again does
 * nothing. With `map_full` code at CPL3 may use all memory of the process until page tables say otherwise; without, only
 * what they give to it (PERM_U).
 *
 * 0, or a negative errno, with a line on standard error that says what to do.
 */
int dune_init(bool map_full);

/**
 * Puts the calling thread into Dune mode, where it is not yet. Threads and children made in Dune mode are there already.
 *
 * 0, or a negative errno, with a line on standard error that says what to do.
 */
int dune_enter(void);

/**
 * A page of the pool, zeroed, with one user; NULL where all are in use.
 */
struct page *dune_page_alloc(void);

/**
 * Gives a page back, whoever uses it; what counts users is dune_page_put.
 */
void dune_page_free(struct page *pg);

/**
 * One more user of a page; returns the page.
 */
struct page *dune_page_get(struct page *pg);

/**
 * One user less; the last one frees the page.
 */
void dune_page_put(struct page *pg);

/**
 * Prints how many pages are in use and free.
 */
void dune_page_stats(void);

/**
 * The page at a physical address of the pool.
 */
struct page *dune_pa2page(physaddr_t pa);

/**
 * The physical address of a page; also its address in the process and in the default page table.
 */
physaddr_t dune_page2pa(struct page *pg);

/**
 * Whether a physical address is in the pool.
 */
bool dune_page_isfrompool(physaddr_t pa);

/**
 * Makes the calling thread use a page table: its top table by address (pgroot, dune_vm_clone) or by physical address.
 * The low 12 bits are ignored, the PCID is the table's own. Without CR3_NOFLUSH the TLB forgets what it has of the table.
 */
void load_cr3(unsigned long cr3);

/**
 * Forgets one page of the loaded table, in every Dune thread that has it loaded.
 */
void dune_flush_tlb_one(unsigned long addr);

/**
 * Forgets the loaded table, in every Dune thread that has it loaded.
 */
void dune_flush_tlb(void);

/**
 * INVPCID of the loaded table's PCID: mode 0 forgets one page, 1 the table, 2 and 3 all tables. A CPU without that
 * instruction forgets the loaded table.
 */
void __invpcid(int mode,
               unsigned long addr);

/**
 * Where memory of the process is in physical memory: what an entry of a page table holds for it. 0 where that cannot be.
 */
uintptr_t dune_va_to_pa(void *ptr);

/**
 * The same, for memory that mmap gave.
 */
uintptr_t dune_mmap_addr_to_pa(void *ptr);

/**
 * The same, for the stack.
 */
uintptr_t dune_stack_addr_to_pa(void *ptr);

/**
 * Gives the pages of a range other permissions, by 4 KiB where they were not mapped with PERM_BIG. Pages that are mapped
 * to nothing are passed over. A large page that the range has a part of is split. With PERM_NONE a page keeps what it is mapped to.
 *
 * 0, -EINVAL, -ENOMEM.
 */
int dune_vm_mprotect(ptent_t *root,
                     void *va,
                     size_t len,
                     int perm);

/**
 * Maps a range to physical memory: what dune_va_to_pa gives, or an address of the process that is no such. PERM_BIG and
 * PERM_BIG_1GB allow large pages where both addresses are multiples of their size.
 *
 * 0, -EINVAL, -ENOMEM.
 */
int dune_vm_map_phys(ptent_t *root,
                     void *va,
                     size_t len,
                     void *pa,
                     int perm);

/**
 * Maps a range to fresh pages of the pool, zeroed, each with one user.
 *
 * 0, -EINVAL, -ENOMEM.
 */
int dune_vm_map_pages(ptent_t *root, void *va, size_t len, int perm);

/**
 * Takes the pages of a range out of the table; pages of the pool lose a user. What the process has there stays.
 */
void dune_vm_unmap(ptent_t *root,
                   void *va,
                   size_t len);

/**
 * The entry for an address, to be read and changed. CREATE_NONE: the entry of 4 KiB, -ENOENT where there is no table for
 * it; large pages that the program did not ask for are split. The others make what is missing: CREATE_NORMAL down to
 * 4 KiB, CREATE_BIG to 2 MiB, CREATE_BIG_1GB to 1 GiB; -EEXIST where a table of smaller pages is there. A large page that
 * the program mapped is its own entry.
 *
 * 0, -EINVAL, -ENOENT, -EEXIST, -ENOMEM.
 */
int dune_vm_lookup(ptent_t *root,
                   void *va,
                   int create,
                   ptent_t **pte_out);

/**
 * Maps a page of the pool, which gets a user more.
 *
 * 0, -EINVAL, -ENOMEM.
 */
int dune_vm_insert_page(ptent_t *root, void *va, struct page *pg, int perm);

/**
 * The page of the pool that an address is mapped to; NULL where it is none. It gets no user more.
 */
struct page *dune_vm_lookup_page(ptent_t *root, void *va);

/**
 * A page table of its own that maps the same; pages of the pool get a user more. NULL where there is no memory, or the
 * process has 4,096 page tables.
 */
ptent_t *dune_vm_clone(ptent_t *root);

/**
 * Gives a page table of dune_vm_clone back; pages of the pool lose a user. Not pgroot, which stays.
 */
void dune_vm_free(ptent_t *root);

/**
 * Settles a write to a page with PTE_COW in the loaded table: it gets a copy from the pool, or becomes writable where it
 * is a page of the pool without other users. Other faults it leaves as they are.
 */
void dune_vm_default_pgflt_handler(uintptr_t addr,
                                   uint64_t fec);

/**
 * Calls `cb` for each page that is mapped to something, from that of `start_va` to that of `end_va`, that included:
 * `end_va` is the last address. Pages are of 4 KiB, large where the program mapped them so. A walk of more than 1 GiB
 * passes over memory of the default page table that is not mapped in the process (VA_START to VA_END: all there is).
 *
 * 0, what `cb` returned, -EINVAL, -ENOMEM.
 */
int dune_vm_page_walk(ptent_t *root,
                      void *start_va,
                      void *end_va,
                      page_walk_cb cb,
                      const void *arg);

/**
 * Prints the registers of a frame.
 */
void dune_dump_trap_frame(struct dune_tf *tf);

/**
 * Calls `cb` for a signal, in Dune mode, with the registers that it interrupted; what `cb` leaves there is loaded.
 *
 * 0, or a negative errno.
 */
int dune_register_signal_handler(int signum,
                                 dune_intr_cb cb);

/**
 * signal(2): the handler runs in Dune mode. The handler before, or SIG_ERR.
 */
sighandler_t dune_signal(int sig, sighandler_t cb);

/**
 * Calls `cb` for exceptions with this vector, at CPL0 and CPL3, on every Dune thread; NULL: for none.
 *
 * 0, or -EINVAL.
 */
int dune_register_intr_handler(int vec,
                               dune_intr_cb cb);

/**
 * Calls `cb` for page faults that have no handler of their vector, at CPL0 and CPL3, on every Dune thread. An access that
 * the process may not make, whatever the page table says, comes there as one to what is not mapped; where it comes again and
 * again at once, because the handler cannot mend that, it becomes Linux' signal.
 */
void dune_register_pgflt_handler(dune_pgflt_cb cb);

/**
 * Calls `cb` for system calls of CPL3, on every Dune thread.
 */
void dune_register_syscall_handler(dune_syscall_cb cb);

/**
 * FS base that CPL3 has: of the visit, or that the next one begins with, which is the thread's own until it is set.
 */
unsigned long dune_get_user_fs(void);

/**
 * Sets that.
 */
void dune_set_user_fs(unsigned long fs_base);

/**
 * Goes on at CPL3 with the registers of `tf`, whose selectors become CPL3's: dune_pop_trap_frame of the same frame goes there,
 * too. Returns what is given to dune_ret_from_user, or -EINVAL outside Dune mode.
 */
int dune_jump_to_user(struct dune_tf *tf);

/**
 * Ends the last visit: its dune_jump_to_user returns `ret`.
 */
void dune_ret_from_user(int ret) __attribute__((noreturn));

/**
 * Goes on with the registers of a frame, at CPL0 or CPL3 as its CS says, and does not come back. Exceptions and system
 * calls of CPL3 come to the handlers as in a visit.
 */
void dune_pop_trap_frame(struct dune_tf *tf);

/**
 * Makes the system call of a frame, on behalf of the program; the result, or the negative errno, goes to RAX. Pointers
 * are those of the process. A child of fork goes on as its parent; new threads and rt_sigreturn get ENOSYS, and
 * arch_prctl is about the segments of CPL3.
 */
void dune_passthrough_syscall(struct dune_tf *tf);

/**
 * Opens an ELF file.
 *
 * 0, -EINVAL where it is no ELF file of 64 bits, else a negative errno.
 */
int dune_elf_open(struct dune_elf *elf, const char *path);

/**
 * The same of `len` bytes in memory, which must stay until dune_elf_close.
 */
int dune_elf_open_mem(struct dune_elf *elf, void *mem, int len);

/**
 * Closes a file, and frees what was copied of it. 0.
 */
int dune_elf_close(struct dune_elf *elf);

/**
 * Calls `cb` for each section header. 0, what `cb` returned, or -EINVAL.
 */
int dune_elf_iter_sh(struct dune_elf *elf, dune_elf_shcb cb);

/**
 * Calls `cb` for each program header. 0, what `cb` returned, or -EINVAL.
 */
int dune_elf_iter_ph(struct dune_elf *elf, dune_elf_phcb cb);

/**
 * Maps a segment at its address + `off`, over whatever is there: what the file has of it, zeroes behind that, with the
 * access that it says.
 *
 * 0, -EINVAL where the file has no such bytes, else a negative errno.
 */
int dune_elf_load_ph(struct dune_elf *elf,
                     Elf64_Phdr *phdr,
                     off_t off);

/**
 * Prints the headers of a file. 0.
 */
int dune_elf_dump(struct dune_elf *elf);

/**
 * Calls `cb` for each mapping of the process, in order of addresses.
 */
void dune_procmap_iterate(dune_procmap_cb cb);

/**
 * Prints the mappings of the process.
 */
void dune_procmap_dump(void);

/**
 * dune_printf with a `va_list`: up to 1,023 bytes to standard output, at once, from handlers too. How many were written.
 */
int dune_vprintf(const char *fmt,
                 void *arguments);

/**
 * Ends the process with status 1, at once.
 */
void dune_die(void);

/**
 * mmap.
 */
void *dune_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#include "inline.h"
