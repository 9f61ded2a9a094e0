//! What the program on outgoing packets is to do, and how it tells what a pod asks IMDS for.

/// A bit of `EGRESS_JOBS`: pods in `intercept` and `deny` send nothing to IMDS or the target but what `connect` has let
/// through.
pub const JOB_FILTER: u32 = 1;
/// A bit of `EGRESS_JOBS`: what pods in `audit` ask IMDS for is reported.
pub const JOB_AUDIT_PATHS: u32 = 1 << 1;

/// How much of a request is looked at: enough for the longest that is distinguished, `HEAD /YYYY-MM-DD/meta-data/iam/`.
pub const HEAD_LEN: usize = 32;

/// What a request to IMDS is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A session token, without which IMDSv2 answers nothing else: says nothing about what comes next.
    Token,
    /// The node's role, its name or its credentials.
    Credentials,
    /// What the instance was started with, which often holds secrets.
    UserData,
    /// Anything else: the region, the instance's identity, …
    Other,
}

// === impl Asked ===

impl Asked {
    /// What a request is for, by its beginning; the rest of `head` is 0 where the request is shorter.
    ///
    /// IMDS is plain HTTP/1.1, where a path is `/<version>/meta-data/…`; clients send the request line in one segment.
    /// Only a request for a token is a `PUT`.
    #[inline(always)]
    pub fn of(head: &[u8; HEAD_LEN]) -> Self {
        if has(head, 0, b"PUT ") {
            return Self::Token;
        }
        let path = after_version(head);
        if has(head, path, b"meta-data/iam/") {
            Self::Credentials
        } else if has(head, path, b"user-data") {
            Self::UserData
        } else {
            Self::Other
        }
    }
}

/// Where the path goes on after its version: behind the second slash. The end of `head` where it has none.
#[inline(always)]
fn after_version(head: &[u8; HEAD_LEN]) -> usize {
    let first = after_slash(head, 0);
    after_slash(head, first)
}

/// The place after the next slash.
#[inline(always)]
fn after_slash(head: &[u8; HEAD_LEN], from: usize) -> usize {
    let mut at = from;
    while at < HEAD_LEN && head[at] != b'/' {
        at += 1;
    }
    at + 1
}

/// Whether `what` is at this place.
#[inline(always)]
fn has<const N: usize>(head: &[u8; HEAD_LEN], at: usize, what: &[u8; N]) -> bool {
    what.iter().enumerate().all(|(index, byte)| head.get(at + index) == Some(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(request: &str) -> Asked {
        let mut head = [0; HEAD_LEN];
        let length = request.len().min(HEAD_LEN);
        head[..length].copy_from_slice(&request.as_bytes()[..length]);
        Asked::of(&head)
    }

    #[test]
    fn requests_are_told_apart_whatever_their_method_and_version() {
        for (request, expected) in [
            ("PUT /latest/api/token HTTP/1.1\r\n", Asked::Token),
            ("GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\n", Asked::Credentials),
            ("GET /latest/meta-data/iam/info HTTP/1.1\r\n", Asked::Credentials),
            ("HEAD /2021-07-15/meta-data/iam/ HTTP/1.1\r\n", Asked::Credentials),
            ("GET /1.0/meta-data/iam/security-credentials/node HTTP/1.0\r\n", Asked::Credentials),
            ("GET /latest/user-data HTTP/1.1\r\n", Asked::UserData),
            ("GET /2009-04-04/user-data\r\n", Asked::UserData),
            ("GET /latest/meta-data/instance-id HTTP/1.1\r\n", Asked::Other),
            ("GET /latest/meta-data/iamb/ HTTP/1.1\r\n", Asked::Other),
            ("GET /latest/dynamic/instance-identity/document HTTP/1.1\r\n", Asked::Other),
            ("GET /user-data HTTP/1.1\r\n", Asked::Other),
            ("GET / HTTP/1.1\r\n\r\n", Asked::Other),
            ("\x16\x03\x01", Asked::Other),
            ("", Asked::Other),
        ] {
            assert_eq!(asked(request), expected, "{request:?}");
        }
    }
}
