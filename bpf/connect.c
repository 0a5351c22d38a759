// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* cgroup/connect4 and connect6 of a captured pod: the destination of a TCP connect becomes the proxy's listener in the pod itself, and
 * the one that was meant stays with the socket. What is not to be captured is left alone, so that it goes where it went without us; what is
 * and cannot be is refused (EPERM), so that an application that knows another address of its peer takes that. */

#define CONNECT_REFUSE 0
#define CONNECT_ALLOW 1

static inline int covered(u64 netns, const struct narrows_end *to, int included)
{
	struct narrows_range range = {.bits = NARROWS_NETNS_BITS + 128, .netns = {(u32)netns, (u32)(netns >> 32)}};

	range.ip[0] = to->ip[0];
	range.ip[1] = to->ip[1];
	range.ip[2] = to->ip[2];
	range.ip[3] = to->ip[3];
	return included ? included_ranges.lookup(&range) != 0 : excluded_ranges.lookup(&range) != 0;
}

/* The pod's own addresses, loopback and the wildcard (which connects to loopback) never leave the pod. */
static inline int stays_inside(const struct narrows_pod *pod, const struct narrows_end *to)
{
	if (to->ip[0] == 0 && to->ip[1] == 0 && to->ip[2] == bpf_htonl(0xffff))
		return to->ip[3] == 0 || to->ip[3] == pod->ip4 || (bpf_ntohl(to->ip[3]) >> 24) == 127;
	if (to->ip[0] == 0 && to->ip[1] == 0 && to->ip[2] == 0)
		return to->ip[3] == 0 || to->ip[3] == bpf_htonl(1);
	if ((bpf_ntohl(to->ip[0]) & 0xffc00000) == 0xfe800000)	/* link-local: as plan.py's LINK_LOCAL */
		return 1;
	return to->ip[0] == pod->ip6[0] && to->ip[1] == pod->ip6[1] && to->ip[2] == pod->ip6[2] && to->ip[3] == pod->ip6[3];
}

/* The proxy's own ports are no service of anybody, here or in another pod. */
static inline int is_ours(const struct narrows_end *to)
{
	return to->port == NARROWS_OUTBOUND_PORT || to->port == NARROWS_INBOUND_PORT;
}

/* The pod if this connect is to be captured, or is to the proxy itself, which redirects refuse too; else NULL. */
static inline struct narrows_pod *captures(struct bpf_sock_addr *ctx, const struct narrows_end *to)
{
	u64 netns = bpf_get_netns_cookie(ctx);
	struct narrows_port port = {.netns = netns, .port = to->port};
	struct narrows_pod *pod = pods.lookup(&netns);

	if (!pod)
		return 0;
	if (stays_inside(pod, to))
		return is_ours(to) ? pod : 0;
	if (excluded_ports.lookup(&port) || covered(netns, to, 0))
		return 0;
	if ((pod->flags & NARROWS_ONLY_INCLUDED) && !covered(netns, to, 1))
		return 0;
	return pod;
}

/* Where a connect goes instead, in network order. Nobody can listen on port 0, so who dials the proxy itself is refused as by any host on which
 * nobody listens. */
static inline u32 door(const struct narrows_end *to)
{
	return is_ours(to) ? 0 : bpf_htons(NARROWS_OUTBOUND_PORT);
}

/* Whether it can be captured: there is an address of this family to send it to, and room for where it was meant to go. */
static inline int keep(struct bpf_sock_addr *ctx, const struct narrows_pod *pod, u32 family, const struct narrows_end *to)
{
	struct narrows_end *kept;

	if (is_ours(to)) {
		originals.sk_storage_delete(ctx->sk);
		return 1;
	}
	if (!(pod->flags & family))
		return 0;
	kept = originals.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return 0;
	*kept = *to;
	return 1;
}

/* A socket that is bound to another address than the pod's own is sent to loopback: sk_lookup.c takes no other address but that for one of
 * inside, and a connection that is not bound has to have the pod's own as its source. */
static inline u32 inside4(struct bpf_sock *sk, const struct narrows_pod *pod)
{
	u32 bound = sk->src_ip4;

	return bound && bound != pod->ip4 ? bpf_htonl(0x7f000001) : pod->ip4;
}

static inline void inside6(struct bpf_sock_addr *ctx, const struct narrows_pod *pod)
{
	struct bpf_sock *sk = ctx->sk;
	u32 bound[4] = {sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3]};

	if ((bound[0] | bound[1] | bound[2] | bound[3]) && !(bound[0] == pod->ip6[0] && bound[1] == pod->ip6[1] &&
							     bound[2] == pod->ip6[2] && bound[3] == pod->ip6[3])) {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = 0;
		ctx->user_ip6[3] = bpf_htonl(1);
		asm volatile("" ::: "memory");
	} else {
		ctx->user_ip6[0] = pod->ip6[0];
		ctx->user_ip6[1] = pod->ip6[1];
		ctx->user_ip6[2] = pod->ip6[2];
		ctx->user_ip6[3] = pod->ip6[3];
		asm volatile("" ::: "memory");
	}
}

int narrows_connect4(struct bpf_sock_addr *ctx)
{
	struct narrows_end to = {.ip = {0, 0, bpf_htonl(0xffff), ctx->user_ip4}, .port = bpf_ntohs((u16)ctx->user_port)};
	struct narrows_pod *pod;

	if (ctx->type != TYPE_STREAM || ctx->protocol != PROTOCOL_TCP)
		return CONNECT_ALLOW;
	pod = captures(ctx, &to);
	if (!pod) {
		originals.sk_storage_delete(ctx->sk);	/* the socket may have been connected before */
		return CONNECT_ALLOW;
	}
	if (!keep(ctx, pod, NARROWS_HAS_IP4, &to))
		return CONNECT_REFUSE;
	ctx->user_ip4 = inside4(ctx->sk, pod);
	ctx->user_port = door(&to);
	return CONNECT_ALLOW;
}

int narrows_connect6(struct bpf_sock_addr *ctx)
{
	struct narrows_end to = {.port = bpf_ntohs((u16)ctx->user_port)};
	struct narrows_pod *pod;
	int mapped;

	if (ctx->type != TYPE_STREAM || ctx->protocol != PROTOCOL_TCP)
		return CONNECT_ALLOW;
	to.ip[0] = ctx->user_ip6[0];
	to.ip[1] = ctx->user_ip6[1];
	to.ip[2] = ctx->user_ip6[2];
	to.ip[3] = ctx->user_ip6[3];
	mapped = to.ip[0] == 0 && to.ip[1] == 0 && to.ip[2] == bpf_htonl(0xffff);
	pod = captures(ctx, &to);
	if (!pod) {
		originals.sk_storage_delete(ctx->sk);
		return CONNECT_ALLOW;
	}
	if (!keep(ctx, pod, mapped ? NARROWS_HAS_IP4 : NARROWS_HAS_IP6, &to))
		return CONNECT_REFUSE;
	if (mapped)
		ctx->user_ip6[3] = inside4(ctx->sk, pod);
	else
		inside6(ctx, pod);
	ctx->user_port = door(&to);
	return CONNECT_ALLOW;
}
