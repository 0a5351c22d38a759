/* RE2 for C: compile at prepare time, match on the data path. Nothing throws across this border. */
#pragma once
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* NULL: refused, with a text of at most error_size bytes (NUL included). Bounded: pattern of 4,096 bytes, program of 8,192
 * instructions (RE2's guide to cost; Envoy's former max_program_size is the model), 1 MiB for compiled states. */
void *narrows_re2_compile(const char *pattern, size_t size, char *error, size_t error_size);

/* 1 if the whole of data matches. */
int narrows_re2_match(const void *program, const char *data, size_t size);

void narrows_re2_free(void *program);

#ifdef __cplusplus
}
#endif
