"""DeepSC-COVID (Wang et al., IEEE TMI 2021)."""
