//! The files of exchanges: how they are read, and how an answer is written in their form.
//!
//! A line that begins with `##` names an exchange; others with `#` are remarks. `@ POD at ADDRESS` is who connects to what,
//! `@ anonymous` a caller without an origin, `@ again` the connection of the exchange before. Every exchange goes over each
//! of the addresses that podgate may have; ` through ADDRESS` after the others names the only one that it goes over.
//!
//! `~ 404` and lines of `~~` are what EKS Auth answers: status, its content type where it is not JSON, and the body.
//! Else `~` tells that it is `silent`, that it `times out`, or that something is missing before it: `no credentials`, `no
//! region`, `no token`. `>` is a line of the request, which ends with CR LF; `>>` is one of its body, the lines of which
//! are joined by LF. `<` and `<<` are the same of the answer. `closed` means that the connection ends after it, `silence`
//! that it ends without one.
//!
//! In a request `«text»` stands for the text in base64url, `{session}` for the last session token of IMDS, `{a*9}` for
//! nine times `a`, and `\n`, `\0`, `\xff` for bytes. In an answer `{date}`, `{session}` and `{ms}` stand for a date, a
//! token and three digits of milliseconds.
#![expect(clippy::expect_used, reason = "test code")]

use std::{fmt::Write as _, net::IpAddr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::upstream::{self, Upstream};

/// One request and its answer.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// Where in the file it begins.
    pub(crate) line: usize,
    pub(crate) name: String,
    pub(crate) caller: Caller,
    pub(crate) upstream: Upstream,
    request: Vec<String>,
    body: Vec<String>,
    /// In the form of the file.
    pub(crate) answer: String,
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) enum Caller {
    Pod {
        name: String,
        address: IpAddr,
        /// The one address of podgate's that counts here.
        through: Option<IpAddr>,
    },
    Anonymous,
    Again,
}

// === impl Exchange ===

impl Exchange {
    /// The bytes of the request.
    pub(crate) fn request(&self, session: &str) -> Vec<u8> {
        let head = self.request.iter().flat_map(|line| [bytes(line, session), b"\r\n".to_vec()].concat());
        let body = self.body.iter().map(|line| bytes(line, session)).collect::<Vec<_>>().join(&b'\n');
        head.chain(body).collect()
    }

    pub(crate) fn is_head(&self) -> bool {
        self.request.first().is_some_and(|line| line.starts_with("HEAD "))
    }

    /// Whether it goes over this one of podgate's addresses; `None` where it does if the one before does.
    pub(crate) fn goes_through(&self, address: IpAddr) -> Option<bool> {
        match self.caller {
            Caller::Pod { through, .. } => Some(through.is_none_or(|only| only == address)),
            Caller::Anonymous => Some(true),
            Caller::Again => None,
        }
    }

    /// How many answers there are to be.
    pub(crate) fn answers(&self) -> usize {
        self.answer.lines().filter(|line| line.starts_with("< HTTP/")).count().max(1)
    }
}

/// Reads a file.
pub(crate) fn parse(text: &str) -> Vec<Exchange> {
    let mut exchanges: Vec<Exchange> = Vec::new();
    for (place, line) in text.lines().enumerate() {
        if let Some(name) = line.strip_prefix("## ") {
            exchanges.push(Exchange {
                line: place + 1,
                name: name.to_owned(),
                caller: Caller::Anonymous,
                upstream: Upstream::Fair,
                request: vec![],
                body: vec![],
                answer: String::new(),
            });
            continue;
        }
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let exchange = exchanges.last_mut().expect("a file begins with the name of an exchange");
        let (mark, rest) = line.split_once(' ').unwrap_or((line, ""));
        match mark {
            "@" => exchange.caller = caller(rest),
            "~" => exchange.upstream = upstream(rest),
            "~~" => match &mut exchange.upstream {
                Upstream::Says { body, .. } => body.push_str(rest),
                _ => panic!("line {}: a status comes before it", place + 1),
            },
            ">" => exchange.request.push(rest.to_owned()),
            ">>" => exchange.body.push(rest.to_owned()),
            "<" | "<<" | "closed" | "silence" => put(&mut exchange.answer, line),
            _ => panic!("line {}: {line}", place + 1),
        }
    }
    exchanges
}

fn caller(text: &str) -> Caller {
    let address = |text: &str| text.parse().expect("an address");
    match text.split_once(" at ") {
        Some((name, rest)) => {
            let (orig_dst, through) =
                rest.split_once(" through ").map_or((rest, None), |(a, b)| (a, Some(b)));
            Caller::Pod { name: name.into(), address: address(orig_dst), through: through.map(address) }
        }
        None if text == "anonymous" => Caller::Anonymous,
        None if text == "again" => Caller::Again,
        None => panic!("there is no caller {text:?}"),
    }
}

fn upstream(text: &str) -> Upstream {
    match text {
        "silent" => Upstream::Silent,
        "times out" => Upstream::TimesOut,
        "no credentials" => Upstream::NoCredentials,
        "no region" => Upstream::NoRegion,
        "no token" => Upstream::NoToken,
        _ => {
            let (status, content_type) = text.split_once(' ').unwrap_or((text, upstream::JSON));
            Upstream::Says {
                status: status.parse().expect("a status"),
                content_type: content_type.to_owned(),
                body: String::new(),
            }
        }
    }
}

/// A line as it goes over the wire.
fn bytes(line: &str, session: &str) -> Vec<u8> {
    let line = line.replace("{session}", session);
    let mut out = Vec::new();
    let mut rest = line.as_str();
    while let Some(first) = rest.chars().next() {
        let after = &rest[first.len_utf8()..];
        rest = match first {
            '«' => {
                let (text, after) = after.split_once('»').expect("« has its »");
                out.extend(URL_SAFE_NO_PAD.encode(text).bytes());
                after
            }
            '{' if after.get(1..2) == Some("*") => {
                let (times, rest) = after[2..].split_once('}').expect("{ has its }");
                out.extend(after[..1].repeat(times.parse().expect("a number of times")).bytes());
                rest
            }
            '\\' => match after.split_at(1) {
                ("n", after) => push(&mut out, b'\n', after),
                ("0", after) => push(&mut out, 0, after),
                ("x", after) => {
                    let byte = u8::from_str_radix(&after[..2], 16).expect("two digits");
                    push(&mut out, byte, &after[2..])
                }
                (other, _) => panic!("no such escape: \\{other}"),
            },
            _ => {
                out.extend(first.to_string().bytes());
                after
            }
        };
    }
    out
}

fn push<'a>(out: &mut Vec<u8>, byte: u8, after: &'a str) -> &'a str {
    out.push(byte);
    after
}

/// Adds a line.
pub(crate) fn put(out: &mut String, line: impl std::fmt::Display) {
    writeln!(out, "{line}").expect("a string takes everything");
}

/// An answer in the form of the file, and the session token in it.
pub(crate) fn write(head: &str, body: &str) -> (String, Option<String>) {
    let mut out = String::new();
    let has_session = head.contains(" 200 OK") && head.contains("Token-Ttl-Seconds: ");
    for line in head.lines() {
        match line.strip_prefix("Date: ") {
            Some(date) if jiff::civil::DateTime::strptime("%a, %d %b %Y %H:%M:%S GMT", date).is_ok() => {
                put(&mut out, "< Date: {date}");
            }
            _ => put(&mut out, format_args!("< {line}")),
        }
    }
    let is_session = |body: &str| {
        let digits = body.strip_suffix("==").unwrap_or_default();
        digits.len() == 54 && digits.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    let session = (has_session && is_session(body)).then(|| body.to_owned());
    if session.is_some() {
        put(&mut out, "<< {session}");
    } else {
        for line in body.split('\n').filter(|_| !body.is_empty()) {
            put(&mut out, format_args!("<< {}", without_times(line)));
        }
    }
    (out, session)
}

/// The text without the time that something took.
fn without_times(text: &str) -> String {
    let time = |text: &str| {
        let (before, rest) = text.split_once(" after ")?;
        let (digits, rest) = rest.split_once(" ms")?;
        let is_time = digits.len() == 3 && digits.bytes().all(|byte| byte.is_ascii_digit());
        is_time.then(|| format!("{before} after {{ms}} ms{rest}"))
    };
    time(text).unwrap_or_else(|| text.to_owned())
}
