"""Places to patch, drawn at random: for models of three layers of four heads, prompts with positions a, b and end."""

from hypothesis import strategies as st

from neuroplast.components import Node

positions = st.sampled_from([None, "a", "b", "end", "3"])
layers = st.sampled_from(range(3))
heads = st.builds(
    Node,
    st.just("head"),
    layers,
    st.sampled_from(range(4)),
    positions,
    st.sampled_from([None, "q", "k", "v", "keys", "pattern", "values"]),
)
blocks = st.builds(
    lambda kind, layer, at: Node(kind, layer, position=at),
    st.sampled_from(["attention", "mlp", "residual"]), layers, positions,
)  # fmt: skip
sites = st.lists(st.one_of(heads, heads, blocks), min_size=1, max_size=3, unique=True).map(tuple)
