/* SPDX-License-Identifier: MIT OR Apache-2.0 */

/* A plugin that does its work: counts the words of its buffer and capitalizes them. */

#include "plugin.h"

static word count_words(char *text, word bytes);
static word capitalize(char *text, word bytes);

/* Needs relocation, as does the text. */
static const struct {
	const char *name;
	word (*step)(char *text, word bytes);
} steps[] = {
	{ "counting\n", count_words },
	{ "capitalizing\n", capitalize },
};

word words;

static word is_letter(char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static word count_words(char *text, word bytes)
{
	for (word i = 0; i < bytes; i++)
		words += is_letter(text[i]) && (i == 0 || !is_letter(text[i - 1]));
	return words;
}

static word capitalize(char *text, word bytes)
{
	for (word i = 0; i < bytes; i++)
		if (text[i] >= 'a' && text[i] <= 'z' && (i == 0 || !is_letter(text[i - 1])))
			text[i] -= 'a' - 'A';
	return words;
}

static word length(const char *text)
{
	word n = 0;

	while (text[n])
		n++;
	return n;
}

void plugin(char *buffer, word bytes, word what, word address)
{
	word result = 0;

	(void)what;
	(void)address;
	for (word i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
		call(CALL_WRITE, 1, (word)steps[i].name, length(steps[i].name));
		result = steps[i].step(buffer, bytes);
	}
	if (call(CALL_GETPID, 0, 0, 0) != 1)
		result = -1;
	call(CALL_GETUID, 0, 0, 0);
	call(CALL_EXIT, result, 0, 0);
}
