//! The files of exchanges: how they are read, and how an answer is written in their form.
//!
//! A line that begins with `##` names an exchange; others with `#` are remarks. `@ POD at ADDRESS` is who dials what,
//! `@ nobody` a caller without an origin, `@ again` the connection of the exchange before. `>` is a line of the request,
//! which ends with CR LF; `>>` is one of its body, the lines of which are joined by LF. `<` and `<<` are the same of the
//! answer. `closed` means that the connection ends after it, `silence` that it ends without one.
//!
//! In a request `«text»` stands for the text in base64url, `{session}` for the last session token of IMDS, `{a*9}` for
//! nine times `a`, and `\n`, `\0`, `\xff` for bytes. In an answer `{date}` and `{session}` stand for a date and a token.
#![expect(clippy::expect_used, reason = "test code")]

use std::fmt::Write as _;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

/// One request and its answer.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// Where in the file it begins.
    pub(crate) line: usize,
    pub(crate) name: String,
    pub(crate) caller: Caller,
    request: Vec<String>,
    body: Vec<String>,
    /// In the form of the file.
    pub(crate) answer: String,
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) enum Caller {
    Pod { name: String, address: String },
    Nobody,
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
}

/// Reads a file.
pub(crate) fn parse(text: &str) -> Vec<Exchange> {
    let mut exchanges: Vec<Exchange> = Vec::new();
    for (place, line) in text.lines().enumerate() {
        if let Some(name) = line.strip_prefix("## ") {
            exchanges.push(Exchange {
                line: place + 1,
                name: name.to_owned(),
                caller: Caller::Nobody,
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
            ">" => exchange.request.push(rest.to_owned()),
            ">>" => exchange.body.push(rest.to_owned()),
            "<" | "<<" | "closed" | "silence" => put(&mut exchange.answer, line),
            _ => panic!("line {}: {line}", place + 1),
        }
    }
    exchanges
}

fn caller(text: &str) -> Caller {
    match text.split_once(" at ") {
        Some((name, address)) => Caller::Pod { name: name.into(), address: address.into() },
        None if text == "nobody" => Caller::Nobody,
        None if text == "again" => Caller::Again,
        None => panic!("nobody is called {text:?}"),
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

fn put(out: &mut String, line: impl std::fmt::Display) {
    writeln!(out, "{line}").expect("a string takes everything");
}

/// An answer in the form of the file, and the session token in it.
pub(crate) fn write(head: &str, body: &str, closed: bool) -> (String, Option<String>) {
    let mut out = String::new();
    let has_session = head.starts_with("HTTP/1.1 200") && head.contains("Token-Ttl-Seconds: ");
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
            put(&mut out, format_args!("<< {line}"));
        }
    }
    if closed {
        put(&mut out, "closed");
    }
    (out, session)
}
