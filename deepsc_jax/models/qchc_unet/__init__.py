"""QC-HC U-Net (Zhang et al. 2021): segmentation of lungs and infection in one network."""
