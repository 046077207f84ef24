"""DeepSC-COVID in JAX and Flax: joint 3D lesion segmentation and classification of chest CT.

Research software, not for clinical use.
"""

__version__ = "0.1.0"
