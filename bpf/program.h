/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What every program includes: numbers of the kernel's interface that BCC's bpf.h lacks (by names of our own, since real headers have
 * theirs), and the maps, each with its bound. What BCC creates from these while it compiles ends with the compiler; the loader makes the ones that live. */
#pragma once
#include "narrows.h"

#define FAMILY_INET4 2			/* AF_INET, AF_INET6 */
#define FAMILY_INET6 10
#define TYPE_STREAM 1			/* SOCK_STREAM */
#define PROTOCOL_TCP 6
#define LEVEL_IP 0			/* SOL_IP, SOL_SOCKET, SOL_IPV6 */
#define LEVEL_SOCKET 1
#define LEVEL_IPV6 41
#define OPTION_REUSEADDR 2		/* SO_REUSEADDR, SO_BINDTODEVICE, SO_MARK */
#define OPTION_BINDTODEVICE 25
#define OPTION_MARK 36
#define OPTION_ORIGINAL_DST 80		/* SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST */

#define PODS_MAX 4096			/* of one instance */
#define PORTS_MAX 65536
#define RANGES_MAX 65536
#define HANDSHAKES_MAX 16384		/* connects between their SYN and the answer to it, which over lo is microseconds */

BPF_F_TABLE("hash", u64, struct narrows_pod, pods, PODS_MAX, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct narrows_port, u8, excluded_ports, PORTS_MAX, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct narrows_range, u8, excluded_ranges, RANGES_MAX, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct narrows_range, u8, included_ranges, RANGES_MAX, BPF_F_NO_PREALLOC);

/* Where a socket's connection was meant to go: with the client's socket from connect, with the proxy's from accept. It ends with its socket. */
BPF_F_TABLE("sk_storage", int, struct narrows_end, originals, 0, BPF_F_NO_PREALLOC);

/* What brings it from the one socket to the other. */
BPF_TABLE("lru_hash", struct narrows_source, struct narrows_end, handshakes, HANDSHAKES_MAX);

/* What sk_lookup.c sends to the proxy. A listener ends its entry by closing. */
BPF_F_TABLE("hash", u64, struct narrows_inside, inbound, PODS_MAX, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct narrows_port, u8, excluded_inbound, PORTS_MAX, BPF_F_NO_PREALLOC);
struct listeners_table_t {		/* written out: BCC's own sockhash has no lookup, and a value without room for a cookie */
	u64 key;
	u64 leaf;
	void *(*lookup)(u64 *);
	int (*sock_hash_update)(void *, void *, u64);
	u32 max_entries;
};
__attribute__((section("maps/sockhash"))) struct listeners_table_t listeners = {.max_entries = PODS_MAX};
BPF_ANNOTATE_KV_PAIR(listeners, u64, u64);

/* Observation (observe.c) has maps of its own, so that it goes with capture or without. */
#define ENDED_BYTES (1 << 20)		/* some 10,900 records: half a second of 20,000 connections a second */
#define WAKE_RECORDS 512		/* of one CPU: the reader is woken after so many, and else looks by itself */

BPF_F_TABLE("hash", u64, struct narrows_pod, watched, PODS_MAX, BPF_F_NO_PREALLOC);
BPF_F_TABLE("sk_storage", int, u64, began, 0, BPF_F_NO_PREALLOC);
BPF_RINGBUF_OUTPUT(ended, ENDED_BYTES / PAGE_SIZE);
BPF_PERCPU_ARRAY(tally, struct narrows_tally, 1);
