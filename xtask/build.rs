//! Nothing is built here: without a build script, cargo takes no notice of the build dependencies' features.

fn main() {}
