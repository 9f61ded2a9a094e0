//! Callers without attestation: how much each of their addresses may ask of EKS Auth.
//!
//! Owns what is remembered of an address: it lasts as long as one of its tokens does, which is longer than any pause. Never
//! knows whether a token is valid before EKS Auth has judged it.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
};

use jiff::{SignedDuration, Timestamp};

use super::backoff::{self, Failure};
use crate::credentials::{TokenDigest, freshness::Jitter};

/// Fetches of one address that may be queued or running.
pub(super) const FETCHES_PER_ADDRESS: usize = 4;
/// Tokens remembered of one address, and of all.
const TOKENS_PER_ADDRESS: usize = 16;
const MAX_TOKENS: usize = 512;

/// Every address with tokens that EKS Auth has yet to judge, or has refused.
#[derive(Debug, Default)]
pub(super) struct AnonymousCallers(HashMap<IpAddr, AnonymousCaller>);

#[derive(Debug)]
struct AnonymousCaller {
    /// Oldest first.
    tokens: VecDeque<TokenDigest>,
    /// Refusals in a row; concurrent ones count once.
    refusals: u32,
    refused_at: Timestamp,
    /// No token of the address is tried before.
    until: Timestamp,
}

// === impl AnonymousCallers ===

impl AnonymousCallers {
    pub(super) fn tokens_of(&self, address: IpAddr) -> &VecDeque<TokenDigest> {
        const NONE: &VecDeque<TokenDigest> = &VecDeque::new();
        self.0.get(&address).map_or(NONE, |caller| &caller.tokens)
    }

    /// Whether one more fetch may start while so many are in flight. After a refusal it is one at a time.
    pub(super) fn may_try(&self, address: IpAddr, in_flight: usize, now: Timestamp) -> bool {
        let Some(caller) = self.0.get(&address) else { return true };
        let most = if caller.refusals == 0 { FETCHES_PER_ADDRESS } else { 1 };
        now >= caller.until && in_flight < most
    }

    /// The address that must lose a token before this one can have another.
    pub(super) fn full_address(&self, address: IpAddr) -> Option<IpAddr> {
        if self.tokens_of(address).len() >= TOKENS_PER_ADDRESS {
            return Some(address);
        }
        let all: usize = self.0.values().map(|caller| caller.tokens.len()).sum();
        let largest = self.0.iter().max_by_key(|(_, caller)| caller.tokens.len());
        largest.filter(|_| all >= MAX_TOKENS).map(|(address, _)| *address)
    }

    pub(super) fn add_token(&mut self, address: IpAddr, token: TokenDigest) {
        self.0.entry(address).or_insert_with(AnonymousCaller::new).tokens.push_back(token);
    }

    pub(super) fn remove_token(&mut self, address: IpAddr, token: &TokenDigest) {
        let Some(caller) = self.0.get_mut(&address) else { return };
        caller.tokens.retain(|other| other != token);
        if caller.tokens.is_empty() {
            self.0.remove(&address);
        }
    }

    /// EKS Auth has refused one of its tokens.
    pub(super) fn refused(&mut self, address: IpAddr, begun_at: Timestamp, now: Timestamp, jitter: Jitter) {
        let Some(caller) = self.0.get_mut(&address) else { return };
        if begun_at >= caller.refused_at {
            (caller.refusals, caller.refused_at) = (caller.refusals.saturating_add(1), now);
            caller.until = now + backoff::foreground_pause(Failure::Refused, caller.refusals, jitter);
        }
    }

    /// EKS Auth has taken one of its tokens.
    pub(super) fn accepted(&mut self, address: IpAddr) {
        let Some(caller) = self.0.get_mut(&address) else { return };
        (caller.refusals, caller.until) = (0, Timestamp::MIN);
    }

    pub(super) fn clock_set_back(&mut self, by: SignedDuration) {
        for caller in self.0.values_mut() {
            let moved = |at: Timestamp| at.checked_sub(by).unwrap_or(Timestamp::MIN);
            (caller.until, caller.refused_at) = (moved(caller.until), moved(caller.refused_at));
        }
    }
}

// === impl AnonymousCaller ===

impl AnonymousCaller {
    fn new() -> Self {
        Self { tokens: VecDeque::new(), refusals: 0, refused_at: Timestamp::MIN, until: Timestamp::MIN }
    }
}
