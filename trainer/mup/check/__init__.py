"""The coordinate check: does everything in a model keep its size while the model grows?

`measuring` trains a few steps at several widths and notes sizes; `verdict` fits their slopes over
the width and says which module is at fault. Yang et al. 2022 (arXiv 2203.03466, appendix D.1).
"""
