/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* ELF helpers and the process map. Loads a small program made here and runs it in ring 3. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <fcntl.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include "libdune/dune.h"
static int bad;
#define CHECK(c) do { if (!(c)) { printf("ci_elf:%d: not: %s\n", __LINE__, #c); bad = 1; } } while (0)
static int nph, nsh, text, bss, stop, privseen, f_main, f_stack, f_heap, f_anon, f_lib, f_vdso, total, disorder;
static unsigned long lastend;
static char self[4096], *anon, *heap;
static int onstack_dummy, *onstack = &onstack_dummy;
static int ph_cb(struct dune_elf *e, Elf64_Phdr *p)
{
	if (memcmp(p, &e->phdr[nph], sizeof *p))
		bad = 1;
	if (e->priv == &nph)
		privseen++;
	return ++nph == stop ? 7 : 0;
}
static int sh_cb(struct dune_elf *e, const char *name, int num, Elf64_Shdr *s)
{
	if (!strcmp(name, ".text"))
		text += s->sh_type == SHT_PROGBITS && s->sh_flags & SHF_EXECINSTR && &e->shdr[num] == s;
	if (!strcmp(name, ".bss"))
		bss += s->sh_type == SHT_NOBITS;
	nsh++;
	return 0;
}
static int load_cb(struct dune_elf *e, Elf64_Phdr *p)
{
	return p->p_type == PT_LOAD ? dune_elf_load_ph(e, p, 0) : 0;
}
static void map_cb(const struct dune_procmap_entry *e)
{
#define HAS(x) (e->begin <= (unsigned long)(x) && (unsigned long)(x) < e->end)
	total++;
	disorder += e->begin >= e->end || e->begin < lastend;
	lastend = e->end;
	if (HAS(map_cb))
		f_main = e->r && e->x && !e->w && e->p && e->type == PROCMAP_TYPE_FILE && !strcmp(e->path, self);
	if (HAS(onstack))
		f_stack = e->r && e->w && e->type == PROCMAP_TYPE_STACK;
	if (HAS(heap))
		f_heap = e->r && e->w && e->type == PROCMAP_TYPE_HEAP;
	if (HAS(anon))
		f_anon = e->r && !e->w && e->type == PROCMAP_TYPE_ANONYMOUS;
	if (HAS(strlen) && e->type == PROCMAP_TYPE_FILE)
		f_lib = e->x && strstr(e->path, ".so") != NULL;
	if (e->type == PROCMAP_TYPE_VDSO)
		f_vdso = e->r && e->x;
}
/* mov $1000,%eax; mov $7,%edi; lea msg(%rip)..: syscall; then stores to its bss and calls 60 */
static const unsigned char code[] = {
	0xb8, 0xe8, 0x03, 0, 0,			/* mov $1000,%eax */
	0xbf, 0x00, 0x10, 0x40, 0x70,		/* mov $0x70401000,%edi: its data */
	0x0f, 0x05,				/* syscall */
	0x89, 0x47, 0x20,			/* mov %eax,0x20(%rdi): its bss */
	0xb8, 60, 0, 0, 0, 0xbf, 33, 0, 0, 0,	/* exit(33) */
	0x0f, 0x05, 0xeb, 0xfe };
static volatile int datagood;
static void sys(struct dune_tf *tf)
{
	if (tf->rax == 1000) {
		datagood = !memcmp((char *)ARG0(tf), "elfdata", 8) && *(int *)(ARG0(tf) + 0x20) == 0
			&& ((char *)ARG0(tf))[0x1fff] == 0;
		tf->rax = 4242;
	} else if (tf->rax == SYS_exit)
		dune_ret_from_user(ARG0(tf));
}

int main(void)
{
	struct dune_elf e;
	struct dune_tf tf;
	char *img = calloc(1, 3 * PGSIZE), *stk;
	Elf64_Ehdr *h = (Elf64_Ehdr *)img;
	Elf64_Phdr *p = (Elf64_Phdr *)(h + 1);
	int here, fd;

	onstack = &here;
	if (readlink("/proc/self/exe", self, sizeof self - 1) < 0 || dune_init_and_enter()) { printf("no dune\n"); return 1; }
	memset(&e, 0, sizeof e);
	CHECK(dune_elf_open(&e, "/proc/self/exe") == 0);
	e.priv = &nph;
	CHECK(!memcmp(e.hdr.e_ident, ELFMAG, 4) && e.hdr.e_machine == EM_X86_64);
	CHECK(dune_elf_iter_ph(&e, ph_cb) == 0);
	CHECK(nph == e.hdr.e_phnum && privseen == nph);
	nph = 0; stop = 3;
	CHECK(dune_elf_iter_ph(&e, ph_cb) == 7 && nph == 3);
	CHECK(dune_elf_iter_sh(&e, sh_cb) == 0);
	CHECK(text == 1 && bss == 1 && nsh >= e.hdr.e_shnum - 1);
	dune_elf_close(&e);
	CHECK(dune_elf_open(&e, "/nonexistent") != 0);
	CHECK(dune_elf_open(&e, "/proc/self/status") != 0);

	/* a program of one code and one data segment, from a file */
	memcpy(h->e_ident, "\177ELF\2\1\1", 7);
	h->e_type = ET_EXEC; h->e_machine = EM_X86_64; h->e_version = 1; h->e_entry = 0x70400200;
	h->e_phoff = sizeof *h; h->e_ehsize = sizeof *h; h->e_phentsize = sizeof *p; h->e_phnum = 2;
	p[0] = (Elf64_Phdr){ PT_LOAD, PF_R | PF_X, 0, 0x70400000, 0x70400000, PGSIZE, PGSIZE, PGSIZE };
	p[1] = (Elf64_Phdr){ PT_LOAD, PF_R | PF_W, PGSIZE, 0x70401000, 0x70401000, 8, 2 * PGSIZE, PGSIZE };
	memcpy(img + 0x200, code, sizeof code);
	strcpy(img + PGSIZE, "elfdata");
	memset(img + PGSIZE + 8, 0xff, 100);	/* not of the segment: must read as 0 */
	fd = open("/tmp/ci_elf.img", O_RDWR | O_CREAT | O_TRUNC, 0700);
	CHECK(fd >= 0 && write(fd, img, 2 * PGSIZE) == 2 * PGSIZE && close(fd) == 0);
	memset(&e, 0, sizeof e);
	CHECK(dune_elf_open(&e, "/tmp/ci_elf.img") == 0);
	CHECK(dune_elf_iter_ph(&e, load_cb) == 0);
	CHECK(!memcmp((void *)0x70400200, code, sizeof code));
	stk = mmap(NULL, 16 * PGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(dune_vm_map_phys(pgroot, (void *)0x70400000, PGSIZE, (void *)dune_va_to_pa((void *)0x70400000), PERM_UCODE) == 0);
	CHECK(dune_vm_map_phys(pgroot, (void *)0x70401000, 2 * PGSIZE, (void *)dune_va_to_pa((void *)0x70401000), PERM_UTEXT) == 0);
	CHECK(dune_vm_mprotect(pgroot, stk, 16 * PGSIZE, PERM_USTACK) == 0);
	dune_register_syscall_handler(sys);
	memset(&tf, 0, sizeof tf);
	tf.rip = e.hdr.e_entry;
	tf.rsp = (uint64_t)stk + 16 * PGSIZE - 64;
	tf.rflags = 0x2;
	CHECK(dune_jump_to_user(&tf) == 33);
	CHECK(datagood && *(volatile int *)0x70401020 == 4242);
	dune_elf_close(&e);

	/* the same image from memory */
	memset(&e, 0, sizeof e);
	CHECK(dune_elf_open_mem(&e, img, 2 * PGSIZE) == 0);
	CHECK(e.hdr.e_entry == 0x70400200 && e.hdr.e_phnum == 2 && e.phdr[1].p_memsz == 2 * PGSIZE);
	nph = stop = 0;
	CHECK(dune_elf_iter_ph(&e, ph_cb) == 0 && nph == 2);
	dune_elf_close(&e);

	heap = malloc(10);
	anon = mmap(NULL, 3 * PGSIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	dune_procmap_iterate(map_cb);
	CHECK(total > 8 && !disorder);
	CHECK(f_main); CHECK(f_stack); CHECK(f_heap); CHECK(f_anon); CHECK(f_lib); CHECK(f_vdso);
	if (!bad)
		printf("ok ci_elf\n");
	return bad;
}
