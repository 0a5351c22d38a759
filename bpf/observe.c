// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* sockops of the proxy and of pods without capture: one record for each connection that ends, with what only the kernel knows of it. Between
 * its first and its last packet a connection costs nothing: of all callbacks only those for changes of state are asked for. */

#define ACCEPTED (1ULL << 63)		/* in `began`, beside a time that does not need the bit */

/* A connection that stays in the pod crosses no network: the proxy's legs to its application, and those that capture sends to the proxy. */
static inline void begins(struct bpf_sock_ops *ctx, struct bpf_sock *sk, u64 accepted)
{
	u64 netns = bpf_get_netns_cookie(ctx);
	struct narrows_pod *pod = watched.lookup(&netns);
	struct narrows_end to = {};
	u64 *kept;

	if (!pod)
		return;
	theirs(ctx, &to);
	if (stays_inside(pod, &to))
		return;
	kept = began.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return;
	*kept = bpf_ktime_get_ns() | accepted;
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static inline void ends(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct narrows_connection *one;
	u64 *kept = began.sk_storage_get(sk, 0, 0);
	struct narrows_tally *counts;
	u64 since;
	int first = 0;

	if (!kept || !*kept)		/* another program asked for this callback */
		return;
	since = *kept;
	*kept = 0;			/* once for each connection of a socket, which may connect again */
	counts = tally.lookup(&first);
	if (!counts)			/* never: an array has all it is made with */
		return;
	one = ended.ringbuf_reserve(sizeof(*one));
	if (!one) {
		counts->lost += 1;
		return;
	}
	counts->written += 1;
	__builtin_memset(one, 0, sizeof(*one));
	one->netns = bpf_get_netns_cookie(ctx);
	one->duration = bpf_ktime_get_ns() - (since & ~ACCEPTED);
	one->sent = ctx->bytes_acked;
	one->received = ctx->bytes_received;
	ours(ctx, &one->local);
	theirs(ctx, &one->remote);
	one->rtt = ctx->srtt_us >> 3;	/* the kernel keeps eighths */
	one->min_rtt = ctx->rtt_min;
	one->retransmits = ctx->total_retrans;
	one->accepted = !!(since & ACCEPTED);
	one->before = ctx->args[0];
	/* a wake-up costs as much as the record: the reader gets one for many */
	ended.ringbuf_submit(one, counts->written % WAKE_RECORDS ? BPF_RB_NO_WAKEUP : BPF_RB_FORCE_WAKEUP);
}

int narrows_observe(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		begins(ctx, sk, 0);
	else if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		begins(ctx, sk, ACCEPTED);
	else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE)
		ends(ctx, sk);
	return 1;
}
