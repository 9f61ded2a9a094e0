//! The values that annotations may have.

use std::str::FromStr;

use super::Annotations;

/// An annotation, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read<'a, T> {
    /// It is not there.
    Absent,
    /// It has a value that it may have.
    Value(T),
    /// It has another.
    Unreadable(&'a str),
}

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switch {
    On,
    Off,
}

/// `allow` or `deny`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allowance {
    Allow,
    Deny,
}

/// Reads one annotation, to the letter.
pub(super) fn read<'a, T: FromStr>(annotations: &'a Annotations, annotation: &str) -> Read<'a, T> {
    match annotations.get(annotation) {
        None => Read::Absent,
        Some(value) => value.parse().map_or(Read::Unreadable(value), Read::Value),
    }
}

impl FromStr for Switch {
    type Err = ();

    fn from_str(switch: &str) -> Result<Self, ()> {
        match switch {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(()),
        }
    }
}

impl FromStr for Allowance {
    type Err = ();

    fn from_str(allowance: &str) -> Result<Self, ()> {
        match allowance {
            "allow" => Ok(Self::Allow),
            "deny" => Ok(Self::Deny),
            _ => Err(()),
        }
    }
}
