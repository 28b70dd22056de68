"""The same training code on a simulated GPU: sizes, copies and operations are followed, no tensor holds data."""
