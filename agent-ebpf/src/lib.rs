//! Empty: a library target makes the package one that other packages may depend on, to be rebuilt with it.
#![no_std]
