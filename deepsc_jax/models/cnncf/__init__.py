"""CNNCF and CNNRF (Liang et al., Communications Biology 4, 2021)."""
