"""A MODEL whose video several GPUs make: the mark of Split over GPUs (QVG), what cannot be split, and a run (`qvg.video.crew`)."""
