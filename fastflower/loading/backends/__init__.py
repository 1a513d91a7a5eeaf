"""What moves the pixels: four ways to carry out the same draws.

In come requests, out go images: by kernel.c (`native`), OpenCV, DALI or Triton kernels. Read `selection` first, then `threads`.
"""
