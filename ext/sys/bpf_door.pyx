"""bpf/narrows.h as this compiler reads it, for the tests that hold the agent's packed keys and values against it."""
from ext.sys.bpf cimport (NARROWS_ACCEPT_KEPT, NARROWS_HAS_IP4, NARROWS_HAS_IP6, NARROWS_HBONE_PORT, NARROWS_INBOUND_PORT,
                          NARROWS_LAYOUT, NARROWS_MARK, NARROWS_MARK_LOCAL, NARROWS_MARK_MASK, NARROWS_NETNS_BITS, NARROWS_NETNS_HERE,
                          NARROWS_ONLY_INCLUDED, NARROWS_OUTBOUND_PORT, NARROWS_PROBE4, NARROWS_PROBE6_0, NARROWS_PROBE6_1,
                          NARROWS_PROBE6_2, NARROWS_PROBE6_3, NARROWS_REDIRECTED, NARROWS_REFLECT4_KEPT,
                          NARROWS_REFLECT6_KEPT, narrows_connection, narrows_end, narrows_inside, narrows_pod, narrows_port, narrows_range,
                          narrows_source, narrows_tally)


def sizes():
    """Bytes, by the name of the struct."""
    return {"pod": sizeof(narrows_pod), "end": sizeof(narrows_end), "source": sizeof(narrows_source), "port": sizeof(narrows_port),
            "range": sizeof(narrows_range), "inside": sizeof(narrows_inside), "connection": sizeof(narrows_connection),
            "tally": sizeof(narrows_tally)}


def constants():
    return {"LAYOUT": NARROWS_LAYOUT, "OUTBOUND_PORT": NARROWS_OUTBOUND_PORT, "INBOUND_PORT": NARROWS_INBOUND_PORT,
            "HBONE_PORT": NARROWS_HBONE_PORT, "MARK": NARROWS_MARK, "MARK_MASK": NARROWS_MARK_MASK, "MARK_LOCAL": NARROWS_MARK_LOCAL,
            "HAS_IP4": NARROWS_HAS_IP4, "HAS_IP6": NARROWS_HAS_IP6, "ONLY_INCLUDED": NARROWS_ONLY_INCLUDED,
            "REDIRECTED": NARROWS_REDIRECTED, "ACCEPT_KEPT": NARROWS_ACCEPT_KEPT, "NETNS_BITS": NARROWS_NETNS_BITS,
            "REFLECT4_KEPT": NARROWS_REFLECT4_KEPT, "REFLECT6_KEPT": NARROWS_REFLECT6_KEPT,
            "NETNS_HERE": int(NARROWS_NETNS_HERE, 16)}


def probes():
    """Where probes come from: IPv4, IPv6."""
    six = 0
    for word in (NARROWS_PROBE6_0, NARROWS_PROBE6_1, NARROWS_PROBE6_2, NARROWS_PROBE6_3):
        six = six << 32 | <unsigned int>word
    return <unsigned int>NARROWS_PROBE4, six
