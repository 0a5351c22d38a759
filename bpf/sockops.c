// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* sockops of a captured pod and of the proxy: takes the original destination from the client's socket, just before its SYN (when its
 * source is known), to the proxy's, when the handshake ends. Over lo both run within one connect(2). */

static inline void ours(struct bpf_sock_ops *ctx, struct narrows_end *end)
{
	if (ctx->family == FAMILY_INET4) {
		end->ip[2] = bpf_htonl(0xffff);
		end->ip[3] = ctx->local_ip4;
		asm volatile("" ::: "memory");
	} else {
		end->ip[0] = ctx->local_ip6[0];
		end->ip[1] = ctx->local_ip6[1];
		end->ip[2] = ctx->local_ip6[2];
		end->ip[3] = ctx->local_ip6[3];
		asm volatile("" ::: "memory");
	}
	end->port = ctx->local_port;
}

static inline void theirs(struct bpf_sock_ops *ctx, struct narrows_end *end)
{
	if (ctx->family == FAMILY_INET4) {
		end->ip[2] = bpf_htonl(0xffff);
		end->ip[3] = ctx->remote_ip4;
		asm volatile("" ::: "memory");
	} else {
		end->ip[0] = ctx->remote_ip6[0];
		end->ip[1] = ctx->remote_ip6[1];
		end->ip[2] = ctx->remote_ip6[2];
		end->ip[3] = ctx->remote_ip6[3];
		asm volatile("" ::: "memory");
	}
	end->port = bpf_ntohl(ctx->remote_port);
}

int narrows_sockops(struct bpf_sock_ops *ctx)
{
	struct narrows_source source = {};
	struct narrows_end *end, *kept;
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		end = originals.sk_storage_get(sk, 0, 0);
		if (!end)
			return 1;
		source.netns = bpf_get_netns_cookie(ctx);
		ours(ctx, &source.end);
		handshakes.update(&source, end);
	} else if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && ctx->local_port == NARROWS_OUTBOUND_PORT) {
		source.netns = bpf_get_netns_cookie(ctx);
		theirs(ctx, &source.end);
		end = handshakes.lookup(&source);
		if (!end)
			return 1;
		kept = originals.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (kept)
			*kept = *end;
		handshakes.delete(&source);	/* so that no later connection of this source is taken for this one */
	}
	return 1;
}
