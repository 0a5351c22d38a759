"""bpf/narrows.h as this compiler reads it, for the tests that hold the agent's packed keys and values against it."""
from ext.sys.bpf cimport (NARROWS_HAS_IP4, NARROWS_HAS_IP6, NARROWS_LAYOUT, NARROWS_MARK, NARROWS_MARK_MASK, NARROWS_NETNS_BITS,
                          NARROWS_ONLY_INCLUDED, NARROWS_OUTBOUND_PORT, narrows_connection, narrows_end, narrows_pod, narrows_port,
                          narrows_range, narrows_source, narrows_tally)


def sizes():
    """Bytes, by the name of the struct."""
    return {"pod": sizeof(narrows_pod), "end": sizeof(narrows_end), "source": sizeof(narrows_source), "port": sizeof(narrows_port),
            "range": sizeof(narrows_range), "connection": sizeof(narrows_connection), "tally": sizeof(narrows_tally)}


def constants():
    return {"LAYOUT": NARROWS_LAYOUT, "OUTBOUND_PORT": NARROWS_OUTBOUND_PORT, "MARK": NARROWS_MARK, "MARK_MASK": NARROWS_MARK_MASK,
            "HAS_IP4": NARROWS_HAS_IP4, "HAS_IP6": NARROWS_HAS_IP6, "ONLY_INCLUDED": NARROWS_ONLY_INCLUDED,
            "NETNS_BITS": NARROWS_NETNS_BITS}
