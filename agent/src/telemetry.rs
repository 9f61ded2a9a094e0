//! Sets up the log: one line an event on standard output, as JSON or for people.

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Sends the log to standard output from now on.
pub(crate) fn init(format: LogFormat, filter: &str) {
    let subscriber = tracing_subscriber::fmt().with_env_filter(EnvFilter::new(filter));
    match format {
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
        LogFormat::Text => subscriber.init(),
    }
}
