// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* cgroup/connect4 and connect6 of the proxy: its connection to a captured pod's application, which has the client's address as its source.
 * - It is bound to lo, which nobody outside can come from: by this sk_lookup.c lets it pass.
 * - It has the mark by which `ip rule` keeps it in the namespace; tcp_fwmark_accept hands that on to the application's side, for the answers.
 * - Its source port is none of the client's own live connections to that port. Without NAT both would have the same four numbers, and
 *   the kernel would take its SYN for a packet of theirs. Ports go round, so that one is free again when its turn comes. */

#define FIRST_PORT 16384		/* of 49,152: a port that waits (TIME_WAIT) comes up again after 2 s at 24,000 connects/s, and the kernel gives
					 * it out after 1 s: over lo it does so by default (tcp_tw_reuse) */
#define PORTS (65536 - FIRST_PORT)
#define LANES 4				/* two CPUs at once do not choose the same: each begins elsewhere on the round */
#define TRIES 8
#define HERE ((u64)(s64)-1)		/* BPF_F_CURRENT_NETNS */
#define LISTENS 10			/* BPF_TCP_LISTEN */
#define HOP_ALLOW 1
#define HOP_REFUSE 0			/* EPERM to the proxy: better than a connection that comes back to it */

struct narrows_bound {			/* sockaddr_in, and sockaddr_in6 */
	u16 family;
	u16 port;
	u32 ip4;
	u32 ip6[4];
	u32 scope;
};

struct narrows_four {			/* bpf_sock_tuple */
	u32 client, pod;
	u16 from, to;
};

struct narrows_six {
	u32 client[4], pod[4];
	u16 from, to;
};

static int (*hop_option)(void *ctx, int level, int name, void *value, int size) = (void *)49;	/* bpf_setsockopt */
static int (*hop_bind)(struct bpf_sock_addr *ctx, void *address, int size) = (void *)64;	/* bpf_bind */
static struct bpf_sock *(*hop_lookup)(void *ctx, void *tuple, u32 size, u64 netns, u64 flags) = (void *)99;	/* bpf_skc_lookup_tcp */
static int (*hop_release)(void *sk) = (void *)86;	/* bpf_sk_release */

/* The pod if this is such a connection: of the keeper's stock, and bound to an address, as none is that goes elsewhere. */
static inline struct narrows_inside *last_hop(struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	u64 netns = bpf_get_netns_cookie(ctx);

	if (ctx->type != TYPE_STREAM || (sk->mark & NARROWS_MARK_MASK) != NARROWS_MARK)
		return 0;
	return inbound.lookup(&netns);
}

static inline int keep_inside(struct bpf_sock_addr *ctx)
{
	char lo[4] = "lo";
	int one = 1, mark = NARROWS_MARK_LOCAL;

	return hop_option(ctx, LEVEL_SOCKET, OPTION_BINDTODEVICE, lo, 3) == 0 &&
		hop_option(ctx, LEVEL_SOCKET, OPTION_MARK, &mark, sizeof(mark)) == 0 &&
		hop_option(ctx, LEVEL_SOCKET, OPTION_REUSEADDR, &one, sizeof(one)) == 0;
}

static inline u16 next_port(struct narrows_inside *pod)
{
	u32 turn = pod->turn + 1;

	pod->turn = turn;
	return bpf_htons((u16)(FIRST_PORT + (turn + (bpf_get_smp_processor_id() & (LANES - 1)) * (PORTS / LANES)) % PORTS));
}

static inline int taken(struct bpf_sock_addr *ctx, void *tuple, u32 size)
{
	struct bpf_sock *found = hop_lookup(ctx, tuple, size, HERE, 0);
	int lives;

	if (!found)
		return 0;
	lives = found->state != LISTENS;
	hop_release(found);
	return lives;
}

int narrows_lasthop4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct narrows_bound bound = {.family = FAMILY_INET4};
	struct narrows_four four = {};
	struct narrows_inside *pod = last_hop(ctx, sk);
	int i;

	if (!pod || !sk->src_ip4)
		return HOP_ALLOW;
	if (!keep_inside(ctx))
		return HOP_REFUSE;
	bound.ip4 = four.client = sk->src_ip4;
	four.pod = ctx->user_ip4;
	for (i = 0; i < TRIES; i++) {
		four.from = bound.port = next_port(pod);
		four.to = (u16)ctx->user_port;
		if (taken(ctx, &four, sizeof(four)))
			continue;
		four.to = bpf_htons(NARROWS_INBOUND_PORT);	/* of one that a rule redirected when capture was by rules */
		if (taken(ctx, &four, sizeof(four)))
			continue;
		if (hop_bind(ctx, &bound, 16) == 0)
			break;
	}
	return HOP_ALLOW;	/* without a port of ours the kernel chooses one */
}

int narrows_lasthop6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct narrows_bound bound = {.family = FAMILY_INET6};
	struct narrows_six six = {};
	struct narrows_inside *pod = last_hop(ctx, sk);
	int i;

	if (!pod)
		return HOP_ALLOW;
	bound.ip6[0] = six.client[0] = sk->src_ip6[0];
	bound.ip6[1] = six.client[1] = sk->src_ip6[1];
	bound.ip6[2] = six.client[2] = sk->src_ip6[2];
	bound.ip6[3] = six.client[3] = sk->src_ip6[3];
	if (!(bound.ip6[0] | bound.ip6[1] | bound.ip6[2] | bound.ip6[3]))
		return HOP_ALLOW;
	if (!keep_inside(ctx))
		return HOP_REFUSE;
	six.pod[0] = ctx->user_ip6[0];
	six.pod[1] = ctx->user_ip6[1];
	six.pod[2] = ctx->user_ip6[2];
	six.pod[3] = ctx->user_ip6[3];
	for (i = 0; i < TRIES; i++) {
		six.from = bound.port = next_port(pod);
		six.to = (u16)ctx->user_port;
		if (taken(ctx, &six, sizeof(six)))
			continue;
		six.to = bpf_htons(NARROWS_INBOUND_PORT);
		if (taken(ctx, &six, sizeof(six)))
			continue;
		if (hop_bind(ctx, &bound, 28) == 0)
			break;
	}
	return HOP_ALLOW;
}
