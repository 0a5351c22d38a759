// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* sk_lookup of a captured pod's namespace: a connection from outside goes to the proxy's listener, as it is: its local address is the one
 * that was dialled. The kernel tells this hook no namespace, so each pod has a program of its own, with its cookie written into it.
 * So every family is captured, of whichever the agent knows an address.
 * Asked is for SYNs alone (and the last packet of a handshake under SYN cookies): connections that live have their sockets. */

#define LOOKUP_DROP 0			/* the client is refused */
#define LOOKUP_PASS 1
#define LOOPBACK_INDEX 1		/* of lo, in every namespace */

static int (*lookup_assign)(struct bpf_sk_lookup *ctx, void *sk, u64 flags) = (void *)124;	/* bpf_sk_assign */
static int (*lookup_release)(void *sk) = (void *)86;	/* bpf_sk_release */

/* Made inside the pod. What comes over lo on a socket that is bound to it is our own (lasthop.c); the rest has an own address as its
 * source, which nobody outside can complete a handshake with. */
static inline int from_inside(struct bpf_sk_lookup *ctx, const struct narrows_inside *pod)
{
	u32 ip[4];

	if (ctx->ingress_ifindex == LOOPBACK_INDEX)
		return 1;
	if (ctx->family == FAMILY_INET4) {
		ip[3] = ctx->remote_ip4;
		return ip[3] == ctx->local_ip4 || ip[3] == pod->ip4 || (bpf_ntohl(ip[3]) >> 24) == 127;
	}
	ip[0] = ctx->remote_ip6[0];
	ip[1] = ctx->remote_ip6[1];
	ip[2] = ctx->remote_ip6[2];
	ip[3] = ctx->remote_ip6[3];
	if (ip[0] == ctx->local_ip6[0] && ip[1] == ctx->local_ip6[1] && ip[2] == ctx->local_ip6[2] && ip[3] == ctx->local_ip6[3])
		return 1;
	if (ip[0] == 0 && ip[1] == 0 && ip[2] == 0 && ip[3] == bpf_htonl(1))
		return 1;
	return ip[0] == pod->ip6[0] && ip[1] == pod->ip6[1] && ip[2] == pod->ip6[2] && ip[3] == pod->ip6[3];
}

/* plan.py's PROBE_SOURCES. */
static inline int from_probe(struct bpf_sk_lookup *ctx)
{
	if (ctx->family == FAMILY_INET4)
		return ctx->remote_ip4 == bpf_htonl(NARROWS_PROBE4);
	return ctx->remote_ip6[0] == bpf_htonl(NARROWS_PROBE6_0) && ctx->remote_ip6[1] == bpf_htonl(NARROWS_PROBE6_1) &&
		ctx->remote_ip6[2] == bpf_htonl(NARROWS_PROBE6_2) && ctx->remote_ip6[3] == bpf_htonl(NARROWS_PROBE6_3);
}

int narrows_sk_lookup(struct bpf_sk_lookup *ctx)
{
	struct narrows_port port = {};
	struct narrows_inside *pod;
	void *listener;
	u64 netns;
	int verdict;

	asm volatile("%0 = " NARROWS_NETNS_HERE " ll" : "=r"(netns));
	if (ctx->protocol != PROTOCOL_TCP)
		return LOOKUP_PASS;
	pod = inbound.lookup(&netns);
	if (!pod)
		return LOOKUP_PASS;
	if (ctx->local_port == NARROWS_INBOUND_PORT)	/* nobody dials it */
		return pod->flags & NARROWS_REDIRECTED ? LOOKUP_PASS : LOOKUP_DROP;
	if (from_inside(ctx, pod) || from_probe(ctx) || ctx->local_port == NARROWS_HBONE_PORT)
		return LOOKUP_PASS;
	if (ctx->local_port == NARROWS_OUTBOUND_PORT)
		return LOOKUP_DROP;
	port.netns = netns;
	port.port = ctx->local_port;
	if (excluded_inbound.lookup(&port))
		return LOOKUP_PASS;
	listener = listeners.lookup(&netns);
	if (!listener)		/* never past the proxy */
		return LOOKUP_DROP;
	verdict = lookup_assign(ctx, listener, 0) == 0 ? LOOKUP_PASS : LOOKUP_DROP;
	lookup_release(listener);
	return verdict;
}
