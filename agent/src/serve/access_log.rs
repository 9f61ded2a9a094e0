//! The access log: one line for each response, and a warning for a refusal that somebody should look at.
//!
//! Owns the fields of those lines; never logs a token, a key or a whole request.

use std::time::Duration;

use hyper::StatusCode;
use tracing::{info, warn};

use super::connection::Connection;
use crate::{
    dialect::{Dialect, Refusal},
    identity::{CallerResolver, Pod},
};

/// One request, as the log tells it.
pub(super) struct Entry<'a> {
    pub(super) connection: &'a Connection,
    pub(super) resolver: &'a CallerResolver,
    pub(super) dialect: Dialect,
    pub(super) status: StatusCode,
    pub(super) refusal: Option<&'a Refusal>,
    pub(super) elapsed: Duration,
}

// === impl Entry ===

impl Entry<'_> {
    /// Writes the entry, unless its caller has used up its lines: callers decide how often they ask.
    pub(super) fn write(&self) {
        let Some(suppressed) = self.connection.permit.may_log() else { return };
        if let Some(refusal) = self.refusal {
            self.warn_of(refusal);
        }
        // Not before: most lines of a busy caller are suppressed.
        let pod = self.connection.pod_uid().and_then(|uid| self.resolver.known(uid));
        info!(
            target: "access",
            dialect = self.dialect.label(),
            status = self.status.as_u16(),
            outcome = self.refusal.map_or("ok", |refusal| &refusal.code),
            suppressed,
            pod.uid = self.connection.pod_uid().map(tracing::field::display),
            pod.name = pod.as_deref().map(Pod::full_name),
            sa = pod.as_deref().map(|pod| tracing::field::display(&pod.service_account)),
            process = process(self.connection),
            ms = u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX),
            "request"
        );
    }

    fn warn_of(&self, refusal: &Refusal) {
        if refusal.status.is_server_error() || refusal.status == StatusCode::FORBIDDEN {
            warn!(
                dialect = self.dialect.label(),
                pod.uid = self.connection.pod_uid().map(tracing::field::display),
                process = process(self.connection),
                reason = refusal.message,
                "a request was refused"
            );
        }
    }
}

/// The process that connected, if the kernel attests one.
pub(super) fn process(connection: &Connection) -> Option<String> {
    connection.origin.as_ref().map(|origin| process_label(&origin.comm, origin.tgid))
}

/// A process as logs name it, `name/pid`. The pod chooses the name, so it is escaped.
pub(crate) fn process_label(comm: &[u8; 16], tgid: u32) -> String {
    let end = comm.iter().position(|byte| *byte == 0).unwrap_or(comm.len());
    let name = String::from_utf8_lossy(&comm[..end]);
    format!("{}/{tgid}", name.escape_debug())
}
