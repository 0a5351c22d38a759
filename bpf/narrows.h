/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What both sides of the kernel boundary share: the programs of bpf/, ext/ (by `cdef extern`) and agent/capture/egress.py, whose
 * packed sizes a test holds against these. Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d; all else is in host order.
 * A change of a size or a meaning changes NARROWS_LAYOUT, which is part of the path of every pin. */
#pragma once
#include <linux/types.h>

#define NARROWS_LAYOUT 1

#define NARROWS_OUTBOUND_PORT 15001
#define NARROWS_INBOUND_PORT 15006
#define NARROWS_HBONE_PORT 15008
#define NARROWS_MARK 0x539		/* SO_MARK of the sockets that the keeper makes in pods; an application may not set it */
#define NARROWS_MARK_MASK 0xfff
#define NARROWS_MARK_LOCAL 0x111	/* of a connection to the pod's own application: `ip rule` keeps it and its answers in the namespace */

#define NARROWS_PROBE4 0xa9fe077f	/* where probes come from, in host order: PROBE_SOURCES of agent/capture/plan.py */
#define NARROWS_PROBE6_0 0xfd169254
#define NARROWS_PROBE6_1 0x71271337
#define NARROWS_PROBE6_2 0xffffffff
#define NARROWS_PROBE6_3 0xffffffff
#define NARROWS_NETNS_HERE "0x6e61727221776f73"	/* what the loader replaces by the cookie of the namespace that a program is for */

#define NARROWS_HAS_IP4 1		/* flags: an address of this family is known; without one connects of it are refused */
#define NARROWS_HAS_IP6 2
#define NARROWS_ONLY_INCLUDED 4		/* nothing is captured but what `included` covers */
#define NARROWS_REDIRECTED 8		/* inside.flags: rules send connections to 15006 as well, so what comes there passes */
#define NARROWS_ACCEPT_KEPT 16		/* tcp_fwmark_accept was 1 before us, and stays so */
#define NARROWS_REFLECT4_KEPT 32	/* so was net.ipv4.fwmark_reflect, */
#define NARROWS_REFLECT6_KEPT 64	/* and net.ipv6.fwmark_reflect */

struct narrows_pod {			/* map `pods`, by the cookie of the pod's network namespace */
	__u32 ip4;			/* where captured connects go: the pod's own addresses */
	__u32 flags;
	__u32 ip6[4];
};

struct narrows_inside {			/* map `inbound`, by the same cookie: whose incoming connections are captured */
	__u32 ip4;			/* the pod's own addresses: what comes from them is its own */
	__u32 flags;
	__u32 ip6[4];
	__u32 turn;			/* of source ports, see lasthop.c */
	__u32 zero;
};

struct narrows_end {			/* an address with its port */
	__u32 ip[4];
	__u32 port;
};

struct narrows_source {			/* map `handshakes`: who connects, as the proxy's socket will see it */
	__u64 netns;			/* cookie: 10.0.0.1:40000 may be in many namespaces */
	struct narrows_end end;
	__u32 zero;
};

struct narrows_port {			/* maps `excluded_ports`, `excluded_inbound`, `excluded_ranges`, `included_ranges` */
	__u64 netns;
	__u64 port;
};

struct narrows_range {			/* a key of an LPM trie */
	__u32 bits;			/* that count, of all that follows */
	__u32 netns[2];			/* the cookie, low half first */
	__u32 ip[4];
};

#define NARROWS_NETNS_BITS 64		/* of narrows_range.bits */

struct narrows_connection {		/* ring `ended`: one connection that is over, as its socket in the pod's namespace saw it */
	__u64 netns;			/* cookie */
	__u64 duration;			/* ns, from the SYN (who connects) or from the end of the handshake (who accepts) */
	__u64 sent;			/* bytes that were acknowledged; a SYN or FIN of ours counts as one, as in TCP_INFO */
	__u64 received;
	struct narrows_end local;
	struct narrows_end remote;
	__u32 rtt;			/* us, smoothed; 0: never measured */
	__u32 min_rtt;			/* us; all ones: never measured */
	__u32 retransmits;		/* segments */
	__u8 accepted;			/* 1: the other side connected */
	__u8 before;			/* state before CLOSED, from which follows how it ended: SYN_SENT failed, ESTABLISHED was reset */
	__u16 zero;
};

struct narrows_tally {			/* map `tally`, of each CPU: records of the ring */
	__u64 written;
	__u64 lost;			/* because the ring was full */
};

_Static_assert(sizeof(struct narrows_pod) == 24, "narrows_pod");
_Static_assert(sizeof(struct narrows_inside) == 32, "narrows_inside");
_Static_assert(sizeof(struct narrows_end) == 20, "narrows_end");
_Static_assert(sizeof(struct narrows_source) == 32, "narrows_source");
_Static_assert(sizeof(struct narrows_port) == 16, "narrows_port");
_Static_assert(sizeof(struct narrows_range) == 28, "narrows_range");
_Static_assert(sizeof(struct narrows_connection) == 88, "narrows_connection");
_Static_assert(sizeof(struct narrows_tally) == 16, "narrows_tally");
