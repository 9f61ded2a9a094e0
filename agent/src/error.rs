//! How an error reads in one line.

use std::error::Error;

/// An error followed by its causes. A cause that is part of the text already is left out: many errors repeat
/// their source's text in their own.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Link(&'static str, #[source] Option<Box<Link>>);

    #[test]
    fn causes_follow_once_each() {
        let error =
            Link("a failed", Some(Box::new(Link("b failed", Some(Box::new(Link("b failed", None)))))));
        assert_eq!(chain(&error), "a failed: b failed");
    }
}
