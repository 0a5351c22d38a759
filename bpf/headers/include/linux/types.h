/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The kernel's integer types for a 64-bit machine, as far as uapi headers and our programs name them. */
#pragma once
#include <uapi/linux/types.h>
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
typedef unsigned long size_t, uintptr_t;
#define true 1
#define false 0
#define NULL ((void *)0)
