//! podgate without some of its defenses, as the suite of attacks wants it to show what they are for.
//!
//! Owns which of them are off, and what stands in the place of those that are more than one condition. It is in no build
//! but that of `podgate-undefended`.

use std::{
    collections::HashMap,
    env,
    net::IpAddr,
    pin::Pin,
    sync::LazyLock,
    task::{Context, Poll, ready},
};

use agent_common::{
    abi::ABI_VERSION,
    defense::{Defense, holds, switch_to},
    origin::Origin,
};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::identity::SourcePod;

/// Which defenses are off: labels, separated by commas.
const VARIABLE: &str = "PODGATE_WITHOUT";
/// The ABI that the pins are to be of.
const ABI_VARIABLE: &str = "PODGATE_ABI";

/// Who was first known at an address.
static KNOWN: LazyLock<Mutex<HashMap<IpAddr, (Origin, SourcePod)>>> = LazyLock::new(Mutex::default);

/// Tells the kernel programs what is off.
type Tell = Box<dyn FnMut(u64) -> Result<(), String> + Send>;

/// How to tell those that are loaded.
static PROGRAMS: Mutex<Option<Tell>> = Mutex::new(None);

/// A connection whose requests seem to have no bodies.
pub(crate) struct Unframed<S>(pub(crate) S);

/// Switches off what the environment names. An error names what is no defense.
pub(crate) fn init() -> Result<(), String> {
    switch(&env::var(VARIABLE).unwrap_or_default()).map_err(|error| format!("{VARIABLE}: {error}"))
}

/// Switches off the defenses of these labels, separated by commas, and every other one on again: here and in the programs,
/// if they are loaded. Whoever was known at an address is so no more. A defense that is looked at only when an agent starts
/// stays as it was then.
pub(crate) fn switch(labels: &str) -> Result<(), String> {
    let find = |label: &str| Defense::ALL.iter().copied().find(|defense| defense.label() == label);
    let labels = labels.split(',').filter(|label| !label.is_empty());
    let off = labels.map(|label| find(label).ok_or_else(|| format!("there is no defense {label}")));
    let bits = switch_to(off.collect::<Result<Vec<_>, _>>()?);
    KNOWN.lock().clear();
    PROGRAMS.lock().as_mut().map_or(Ok(()), |tell| tell(bits))
}

/// Says how to tell the programs what is off, once they are loaded.
pub(crate) fn on_switch(tell: Tell) {
    *PROGRAMS.lock() = Some(tell);
}

/// What this build says of itself.
pub(crate) fn warning() -> String {
    let off: Vec<_> =
        Defense::ALL.iter().filter(|defense| !holds(**defense)).map(|defense| defense.label()).collect();
    format!(
        "UNDEFENDED BUILD, for the suite of attacks only: never run it where credentials are real. Switched off: {}",
        if off.is_empty() { "nothing".to_owned() } else { off.join(", ") }
    )
}

/// Who is taken for the caller at an address: whoever was there first, as a cache has it that nobody tells that the
/// address has changed hands.
pub(crate) fn by_address(
    peer: IpAddr,
    origin: Option<Origin>,
    source_pod: Option<SourcePod>,
) -> (Option<Origin>, Option<SourcePod>) {
    if holds(Defense::IdentityByTicket) {
        return (origin, source_pod);
    }
    let mut known = KNOWN.lock();
    let found = match origin.zip(source_pod.clone()) {
        Some(own) => Some(known.entry(peer).or_insert(own).clone()),
        None => known.get(&peer).cloned(),
    };
    match found {
        Some((origin, source_pod)) => (Some(origin), Some(source_pod)),
        None => (origin, source_pod),
    }
}

/// Which ABI the pins are of: podgate's, or another one that the environment names, so that an upgrade to another ABI can
/// be tested before there is one.
pub(crate) fn abi_version() -> u32 {
    let other = env::var(ABI_VARIABLE).ok().and_then(|version| version.parse().ok());
    other.unwrap_or(ABI_VERSION)
}

// === impl Unframed ===

impl<S: AsyncRead + Unpin> AsyncRead for Unframed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.0).poll_read(cx, buffer));
        if !holds(Defense::Framing) {
            hide_length(&mut buffer.filled_mut()[before..]);
        }
        Poll::Ready(result)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Unframed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Gives the header with a body's length another name.
fn hide_length(bytes: &mut [u8]) {
    const NAME: &[u8] = b"content-length:";
    for at in 0..bytes.len().saturating_sub(NAME.len()) {
        if bytes[at..at + NAME.len()].eq_ignore_ascii_case(NAME) {
            bytes[at] = b'x';
        }
    }
}
