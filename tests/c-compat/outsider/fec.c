/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The error code that a page-fault handler gets is the processor's, also for an address with no PTE. */
#include <stdio.h>
#include "libdune/dune.h"
static int bad;
static volatile uint64_t got, err;
static void on_pf(uintptr_t addr, uint64_t fec, struct dune_tf *tf) { got = fec; err = tf->err; tf->rip += 3; }
static void try(const char *what, unsigned long va, int write, uint64_t want)
{
	got = 0xdead;
	if (write)
		asm volatile("movb $66, (%%rax)" : : "a"(va) : "memory");
	else
		asm volatile("mov (%%rax), %%rcx" : : "a"(va) : "rcx", "memory");
	if (got != want || err != want) {
		printf("ci_fec: %s: fec %lx tf->err %lx, want %lx\n", what, (long)got, (long)err, (long)want);
		bad = 1;
	}
}
int main(void)
{
	static char a[3 * PGSIZE] __attribute__((aligned(PGSIZE)));
	ptent_t *pte;
	if (dune_init_and_enter()) { printf("no dune\n"); return 1; }
	dune_register_pgflt_handler(on_pf);
	try("nothing there, read", 0x4a0000000000, 0, 0);
	try("nothing there, write", 0x4a0000000000, 1, 2);
	dune_vm_map_pages(pgroot, (void *)0x4a0000000000, PGSIZE, PERM_R | PERM_W);
	try("beside a mapped page, read", 0x4a0000001000, 0, 0);
	try("beside a mapped page, write", 0x4a0000001000, 1, 2);
	dune_vm_lookup(pgroot, (void *)0x4a0000000000, 0, &pte);
	*pte &= ~(ptent_t)PTE_P;
	dune_flush_tlb();
	try("PTE_P cleared", 0x4a0000000000, 1, 2);
	dune_vm_unmap(pgroot, (void *)0x4a0000000000, PGSIZE);
	try("unmapped", 0x4a0000000000, 1, 2);
	dune_vm_mprotect(pgroot, a, PGSIZE, PERM_R);
	try("mprotect R, write", (unsigned long)a, 1, 3);
	dune_vm_mprotect(pgroot, a, PGSIZE, PERM_NONE);
	try("mprotect NONE, read", (unsigned long)a, 0, 0);
	try("null pointer, read", 8, 0, 0);
	try("null pointer, write", 8, 1, 2);
	if (!bad)
		printf("ok ci_fec\n");
	return bad;
}
