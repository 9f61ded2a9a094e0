//! Credentials on the wire between two agents: JSON, which agents of other versions read as well.
//!
//! Owns that format; pure. What was received is authenticated, but parsed as untrusted all the same.

use std::{borrow::Cow, sync::Arc};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::session::SEAL;
use crate::{
    credentials::{Credentials, Role, cache::Transferred},
    identity::{PodUid, ServiceAccountRef},
};

/// Room for an entry besides its session token: more than it needs.
const ENTRY: usize = 1024;

/// A pod's credentials.
#[derive(Serialize, Deserialize)]
struct Entry<'a> {
    #[serde(borrow)]
    pod: Cow<'a, str>,
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow)]
    service_account: Cow<'a, str>,
    #[serde(borrow)]
    access_key_id: Cow<'a, str>,
    #[serde(borrow)]
    secret_access_key: Cow<'a, str>,
    #[serde(borrow)]
    session_token: Cow<'a, str>,
    expiration: Timestamp,
    obtained_at: Timestamp,
    #[serde(borrow)]
    account_id: Cow<'a, str>,
    #[serde(borrow)]
    partition: Cow<'a, str>,
    #[serde(borrow)]
    role: Cow<'a, str>,
    refresh_at: Timestamp,
    asked: bool,
}

/// Encodes entries, with room for the seal: no copy of a secret stays behind when the buffer grows.
pub(crate) fn encode(entries: &[Transferred]) -> serde_json::Result<Zeroizing<Vec<u8>>> {
    let size = |entry: &Transferred| ENTRY + entry.credentials.session_token.expose().len();
    let room = entries.iter().map(size).sum::<usize>() + SEAL;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    serde_json::to_writer(&mut *bytes, &entries.iter().map(Entry::of).collect::<Vec<_>>())?;
    Ok(bytes)
}

/// Decodes them. `None` where no agent would have sent it.
pub(crate) fn decode(bytes: &[u8]) -> Option<Vec<Transferred>> {
    let entries: Vec<Entry<'_>> = serde_json::from_slice(bytes).ok()?;
    entries.into_iter().map(Entry::transferred).collect()
}

// === impl Entry ===

impl<'a> Entry<'a> {
    fn of(entry: &'a Transferred) -> Self {
        let credentials = &entry.credentials;
        Self {
            pod: entry.pod.to_string().into(),
            namespace: (&entry.service_account.namespace).into(),
            service_account: (&entry.service_account.name).into(),
            access_key_id: (&credentials.access_key_id).into(),
            secret_access_key: credentials.secret_access_key.expose().into(),
            session_token: credentials.session_token.expose().into(),
            expiration: credentials.expiration,
            obtained_at: credentials.obtained_at,
            account_id: (&credentials.role.account_id).into(),
            partition: (&credentials.role.partition).into(),
            role: (&credentials.role.name).into(),
            refresh_at: entry.refresh_at,
            asked: entry.asked,
        }
    }

    fn transferred(self) -> Option<Transferred> {
        Some(Transferred {
            pod: PodUid::parse(&self.pod)?,
            service_account: ServiceAccountRef {
                namespace: self.namespace.into_owned(),
                name: self.service_account.into_owned(),
            },
            credentials: Arc::new(Credentials {
                access_key_id: self.access_key_id.into_owned(),
                secret_access_key: self.secret_access_key.into(),
                session_token: self.session_token.into(),
                expiration: self.expiration,
                obtained_at: self.obtained_at,
                role: Role {
                    account_id: self.account_id.into_owned(),
                    partition: self.partition.into_owned(),
                    name: self.role.into_owned(),
                },
            }),
            refresh_at: self.refresh_at,
            asked: self.asked,
        })
    }
}
