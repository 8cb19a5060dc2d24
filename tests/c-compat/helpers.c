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
	unsigned long before = dune_get_ticks(), now;
	char *p;

	do
		now = dune_get_ticks();
	while (now == before);
	assert(now > before);
	assert(dune_printf("%s %d %c %lx %5.2f|\n", "text", -5, 'x', 0xabcUL, 2.5) == 21);
	p = dune_mmap(NULL, PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert(p != MAP_FAILED && p[0] == 0);
	p[PGSIZE - 1] = 1;
	assert(dune_mmap(NULL, 0, PROT_READ, MAP_PRIVATE, -1, 0) == MAP_FAILED);
}

static void test_procmap(void)
{
	ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);

	assert(length > 0 && malloc(100));
	/* In the middle of what nobody may read, so that it merges with no neighbour. */
	anonymous = mmap(NULL, 5 * PGSIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert(anonymous != MAP_FAILED);
	anonymous += PGSIZE;
	assert(mprotect(anonymous, 3 * PGSIZE, PROT_READ) == 0);
	dune_procmap_iterate(on_map);
	assert(maps > 5 && saw_heap && saw_stack && saw_file && saw_vdso);
	assert(saw_anonymous);
	dune_procmap_dump();
}

static void test_elf(void)
{
	struct dune_elf elf, copy;
	char *memory;

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
	assert(dune_elf_dump(&elf) == 0);

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
	assert(dune_elf_close(&elf) == 0);
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
	return variable != 4711;
}
