/* SPDX-License-Identifier: MIT OR Apache-2.0 */

/* A plugin that tries what it must not do. The host says what (the order of its table) and where its secret is. */

#include "plugin.h"

static const char path[] = "/etc/passwd";

void plugin(char *buffer, word bytes, word what, word address)
{
	word *secret = (word *)address;
	long result = 0;

	(void)bytes;
	switch (what) {
	case 0:
		/* Hand it out, if it can be read. */
		*(word *)buffer = *secret;
		break;
	case 1:
		*secret = 0;
		break;
	case 2:
		/* A system call past the host: getpid by VMCALL. */
		__asm__ volatile("vmcall" : "=a"(result) : "a"(CALL_GETPID));
		break;
	case 3:
		result = call(CALL_OPEN, (word)path, 0, 0);
		break;
	case 4:
		/* Have the host read it. */
		result = call(CALL_WRITE, 1, address, 8);
		break;
	case 5:
		result = call(CALL_WRITE, 1, (word)buffer, -1UL);
		break;
	case 6:
		/* Direction, nested task, alignment check and IOPL set, then to the host. */
		__asm__ volatile("pushfq; orq $0x47400, (%%rsp); popfq; syscall; cld"
				 : "=a"(result)
				 : "a"(CALL_OPEN), "D"(0)
				 : "rcx", "r11", "memory", "cc");
		break;
	case 7:
		/* Its stack is the host's: whoever pushes there overwrites the secret. */
		__asm__ volatile("mov %%rsp, %%rbx; lea 8(%1), %%rsp; syscall; mov %%rbx, %%rsp"
				 : "=a"(result)
				 : "r"(address), "a"(CALL_OPEN), "D"(0)
				 : "rbx", "rcx", "r11", "memory");
		break;
	case 8:
		((void (*)(void))address)();
		break;
	case 9:
		__asm__ volatile("cli");
		break;
	case 10:
		for (;;)
			;
	}
	call(CALL_EXIT, result, 0, 0);
}
