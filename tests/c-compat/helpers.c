/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Utilities, process map, ELF, FPU, model-specific registers.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "libdune/cpu-x86.h"
#include "libdune/dune.h"

#include "capture.h"

static int variable = 4711;
static int maps, segments, sections;
static int saw_heap, saw_stack, saw_file, saw_anonymous, saw_vdso;
static char *anonymous, self[256];
static Elf64_Phdr data;
static Elf64_Shdr text;

static void on_map(const struct dune_procmap_entry *entry)
{
	int here = 0;

	maps++;
	assert(entry->begin < entry->end && entry->begin % PGSIZE == 0);
	saw_heap |= entry->type == PROCMAP_TYPE_HEAP && strcmp(entry->path, "[heap]") == 0;
	saw_vdso |= entry->type == PROCMAP_TYPE_VDSO && entry->x;
	if (entry->begin <= (uintptr_t)&here && (uintptr_t)&here < entry->end)
		saw_stack = entry->type == PROCMAP_TYPE_STACK && entry->r && entry->w && entry->p;
	if (entry->begin <= (uintptr_t)on_map && (uintptr_t)on_map < entry->end)
		saw_file = entry->type == PROCMAP_TYPE_FILE && entry->r && entry->x && !entry->w &&
			   strcmp(entry->path, self) == 0;
	if (entry->begin == (uintptr_t)anonymous)
		saw_anonymous = entry->type == PROCMAP_TYPE_ANONYMOUS && entry->r && !entry->w && entry->p &&
				entry->end == entry->begin + 3 * PGSIZE;
}

static int on_segment(struct dune_elf *elf, Elf64_Phdr *phdr)
{
	assert(phdr == &elf->phdr[segments]);
	segments++;
	if (phdr->p_type == PT_LOAD && (phdr->p_flags & PF_W))
		data = *phdr;
	return 0;
}

static int on_section(struct dune_elf *elf, const char *sname, int snum, Elf64_Shdr *shdr)
{
	assert(snum == sections && shdr == &elf->shdr[snum]);
	sections++;
	if (strcmp(sname, ".text") == 0) {
		text = *shdr;
		return 5;
	}
	return 0;
}

static int count_section(struct dune_elf *elf, const char *sname, int snum, Elf64_Shdr *shdr)
{
	(void)elf;
	(void)sname;
	(void)snum;
	(void)shdr;
	sections++;
	return 0;
}

static void test_utilities(void)
{
	unsigned long before = dune_get_ticks(), now = before;
	char *p;
	int i, written;

	for (i = 0; i < 1000000 && now == before; i++)
		now = dune_get_ticks();
	assert(now > before);
	begin_capture();
	written = dune_printf("%s %d %c %lx %5.2f|\n", "text", -5, 'x', 0xabcUL, 2.5);
	end_capture();
	assert(written == 21 && strcmp(captured, "text -5 x abc  2.50|\n") == 0);
	p = dune_mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert(p != MAP_FAILED && p[0] == 0);
	p[PGSIZE - 1] = 1;
	assert(dune_mmap(NULL, 0, PROT_READ, MAP_PRIVATE, -1, 0) == MAP_FAILED);
}

static void test_procmap(void)
{
	ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
	char range[64];

	assert(length > 0 && malloc(100));
	/* In the middle of what nobody may read, so that it merges with no neighbour. */
	anonymous = mmap(NULL, 5 * PGSIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert(anonymous != MAP_FAILED);
	anonymous += PGSIZE;
	assert(mprotect(anonymous, 3 * PGSIZE, PROT_READ) == 0);
	dune_procmap_iterate(on_map);
	assert(maps > 5 && saw_heap && saw_stack && saw_file && saw_vdso);
	assert(saw_anonymous);
	/* The same, printed. */
	begin_capture();
	dune_procmap_dump();
	end_capture();
	snprintf(range, sizeof(range), "%#018lx-%#018lx r--p", (unsigned long)anonymous,
		 (unsigned long)anonymous + 3 * PGSIZE);
	assert(wrote(range, ""));
	assert(wrote("rw-p", "[stack]") && wrote("r-xp", self) && wrote("-", "[heap]"));
}

static void test_elf(void)
{
	struct dune_elf elf, copy;
	char *memory, line[128];
	unsigned char present;
	void *mapped;
	int i, fd;

	assert(dune_elf_open(&elf, "/nowhere") < 0);
	assert(dune_elf_open(&elf, "/proc/version") < 0);
	assert(dune_elf_open(&elf, "/proc/self/exe") == 0);
	assert(memcmp(elf.mem, ELFMAG, SELFMAG) == 0 && elf.hdr.e_machine == EM_X86_64);
	elf.priv = &elf;
	assert(dune_elf_iter_ph(&elf, on_segment) == 0);
	assert(segments == elf.hdr.e_phnum && data.p_memsz);
	assert(dune_elf_iter_sh(&elf, on_section) == 5);
	assert(text.sh_type == SHT_PROGBITS && (text.sh_flags & SHF_EXECINSTR));
	sections = 0;
	assert(dune_elf_iter_sh(&elf, count_section) == 0 && sections == elf.hdr.e_shnum);
	assert(strcmp(elf.shdrstr + elf.shdr[elf.hdr.e_shstrndx].sh_name, ".shstrtab") == 0);
	begin_capture();
	assert(dune_elf_dump(&elf) == 0);
	end_capture();
	snprintf(line, sizeof(line), "entry %#lx, %d program headers, %d sections", (unsigned long)elf.hdr.e_entry,
		 elf.hdr.e_phnum, elf.hdr.e_shnum);
	assert(wrote(line, ""));
	for (i = 0; i < elf.hdr.e_phnum; i++) {
		snprintf(line, sizeof(line), "segment: type %#x, offset %#lx, address %#lx", elf.phdr[i].p_type,
			 (unsigned long)elf.phdr[i].p_offset, (unsigned long)elf.phdr[i].p_vaddr);
		/* printf writes 0 as 0. */
		assert(!elf.phdr[i].p_type || !elf.phdr[i].p_offset || !elf.phdr[i].p_vaddr || wrote(line, ""));
	}
	snprintf(line, sizeof(line), "address %#lx, offset %#lx", (unsigned long)text.sh_addr,
		 (unsigned long)text.sh_offset);
	assert(wrote(": .text, type", line));

	/* The data segment again, somewhere else: as it is in the file. */
	memory = mmap(NULL, 64 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	assert(memory != MAP_FAILED);
	assert(dune_elf_load_ph(&elf, &data, (off_t)(uintptr_t)memory - (off_t)PGADDR(data.p_vaddr)) == 0);
	memory += PGOFF(data.p_vaddr);
	assert(memcmp(memory, elf.mem + data.p_offset, data.p_filesz) == 0);
	memory[0]++;
	data.p_filesz = data.p_memsz + 1;
	assert(dune_elf_load_ph(&elf, &data, 0) < 0);

	/* The same file from memory; a piece of it is none. */
	assert(dune_elf_open_mem(&copy, elf.mem, elf.len) == 0);
	assert(copy.hdr.e_entry == elf.hdr.e_entry && copy.fd == -1);
	assert(memcmp(copy.phdr, elf.phdr, elf.hdr.e_phnum * sizeof(Elf64_Phdr)) == 0);
	assert(dune_elf_close(&copy) == 0);
	assert(dune_elf_open_mem(&copy, elf.mem, 100) < 0);
	assert(dune_elf_open_mem(&copy, (void *)"no ELF file at all, but long enough for a header, and so on", 60) < 0);
	/* The file and its memory are gone. */
	fd = elf.fd;
	mapped = elf.mem;
	assert(fcntl(fd, F_GETFD) >= 0 && mincore(mapped, PGSIZE, &present) == 0);
	assert(dune_elf_close(&elf) == 0);
	assert(fcntl(fd, F_GETFD) == -1 && mincore(mapped, PGSIZE, &present) == -1);
}

static void test_fpu(void)
{
	static struct fpu_area saved, fresh;
	double before = 1.5, after = 0;
	unsigned int control = 0;

	__asm__ volatile("movsd %0, %%xmm9" : : "m"(before) : "xmm9");
	dune_fpu_save(&saved);
	dune_fpu_init(&fresh);
	assert(fresh.xsave.fxsave.cwd == 0x37f && fresh.xsave.fxsave.mxcsr == 0x1f80);
	fresh.xsave.fxsave.mxcsr = 0x9f80;
	dune_fpu_load(&fresh);
	__asm__ volatile("stmxcsr %0\n\tmovsd %%xmm9, %1" : "=m"(control), "=m"(after));
	assert(control == 0x9f80 && after == 0);
	dune_fpu_load(&saved);
	__asm__ volatile("stmxcsr %0\n\tmovsd %%xmm9, %1" : "=m"(control), "=m"(after));
	assert(control != 0x9f80 && after == 1.5);
}

static int refused;
static unsigned long kernel_gs_base;

/* RDMSR and WRMSR are two bytes long. What libdune has not the program may make up. */
static void on_msr(struct dune_tf *tf)
{
	const unsigned char *code = (unsigned char *)tf->rip;

	refused++;
	assert(tf->rcx == MSR_KERNEL_GS_BASE && tf->err == 0 && code[0] == 0x0f);
	if (code[1] == 0x30) {
		kernel_gs_base = (tf->rdx << 32) | (uint32_t)tf->rax;
	} else {
		assert(code[1] == 0x32);
		tf->rax = (uint32_t)kernel_gs_base;
		tf->rdx = kernel_gs_base >> 32;
	}
	tf->rip += 2;
}

/* The MSR is the host's; SWAPGS has a base of its own to exchange GS base with. */
static void test_kernel_gs_base(void)
{
	unsigned long gs, swapped, again, value = 0;

	assert(dune_register_intr_handler(T_GPFLT, on_msr) == 0);
	wrmsrl(MSR_KERNEL_GS_BASE, 0x123456789aUL);
	rdmsrl(MSR_KERNEL_GS_BASE, value);
	assert(value == 0x123456789aUL && refused == 2);
	assert(dune_register_intr_handler(T_GPFLT, NULL) == 0);

	rdmsrl(MSR_GS_BASE, gs);
	wrmsrl(MSR_GS_BASE, 0x5000);
	__asm__ volatile("swapgs");
	rdmsrl(MSR_GS_BASE, swapped);
	__asm__ volatile("swapgs");
	rdmsrl(MSR_GS_BASE, again);
	wrmsrl(MSR_GS_BASE, gs);
	/* What was written above is nowhere. */
	assert(swapped != 0x5000 && swapped != 0x123456789aUL && again == 0x5000);
	assert(refused == 2);
}

static void test_msrs(void)
{
	unsigned long own, base, word[2] = { 0, 99 }, read;

	rdmsrl(MSR_FS_BASE, own);
	assert(own == dune_get_user_fs());
	rdmsrl(MSR_GS_BASE, base);
	wrmsrl(MSR_GS_BASE, word);
	__asm__ volatile("mov %%gs:8, %0" : "=r"(read));
	wrmsrl(MSR_GS_BASE, base);
	assert(read == 99);
}

int main(void)
{
	assert(dune_init_and_enter() == 0);
	test_utilities();
	test_procmap();
	test_elf();
	test_fpu();
	test_msrs();
	test_kernel_gs_base();
	return variable != 4711;
}
