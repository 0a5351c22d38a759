/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* BCC includes this before everything else. Its own copy of bpf.h is guarded by this option. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
