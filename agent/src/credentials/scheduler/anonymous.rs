//! Callers that nobody vouches for: how much each of their addresses may ask of EKS Auth.
//!
//! Owns what is remembered of an address, which is as long as one of its tokens is: longer than any pause. Never knows
//! whether a token is good before EKS Auth has said so.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
};

use jiff::{SignedDuration, Timestamp};

use super::TokenDigest;
use crate::credentials::scheduler::freshness::{self, Failure, Jitter};

/// Fetches for one address that wait or are under way.
pub(super) const FLIGHTS_PER_ADDRESS: usize = 4;
/// Tokens of one address that are remembered, and of all of them.
const TOKENS_PER_ADDRESS: usize = 16;
const TOKENS_MAX: usize = 512;

/// Every address that has tokens which EKS Auth has yet to judge, or has refused.
#[derive(Debug, Default)]
pub(super) struct AnonymousCallers(HashMap<IpAddr, Stranger>);

#[derive(Debug)]
struct Stranger {
    /// Oldest first.
    tokens: VecDeque<TokenDigest>,
    /// Refusals in a row; of those under way together one counts.
    refusals: u32,
    refused_at: Timestamp,
    /// Until then none of its tokens is looked into.
    until: Timestamp,
}

// === impl AnonymousCallers ===

impl AnonymousCallers {
    pub(super) fn tokens_of(&self, address: IpAddr) -> &VecDeque<TokenDigest> {
        const NONE: &VecDeque<TokenDigest> = &VecDeque::new();
        self.0.get(&address).map_or(NONE, |stranger| &stranger.tokens)
    }

    /// Whether one more fetch may begin while so many wait or are under way. Who was refused has one at a time.
    pub(super) fn may_try(&self, address: IpAddr, under_way: usize, now: Timestamp) -> bool {
        let Some(stranger) = self.0.get(&address) else { return true };
        let most = if stranger.refusals == 0 { FLIGHTS_PER_ADDRESS } else { 1 };
        now >= stranger.until && under_way < most
    }

    /// Of which address a token has to go before this one can have another.
    pub(super) fn without_room(&self, address: IpAddr) -> Option<IpAddr> {
        if self.tokens_of(address).len() >= TOKENS_PER_ADDRESS {
            return Some(address);
        }
        let all: usize = self.0.values().map(|stranger| stranger.tokens.len()).sum();
        let largest = self.0.iter().max_by_key(|(_, stranger)| stranger.tokens.len());
        largest.filter(|_| all >= TOKENS_MAX).map(|(address, _)| *address)
    }

    pub(super) fn remember(&mut self, address: IpAddr, token: TokenDigest) {
        self.0.entry(address).or_insert_with(Stranger::new).tokens.push_back(token);
    }

    pub(super) fn forget(&mut self, address: IpAddr, token: &TokenDigest) {
        let Some(stranger) = self.0.get_mut(&address) else { return };
        stranger.tokens.retain(|other| other != token);
        if stranger.tokens.is_empty() {
            self.0.remove(&address);
        }
    }

    /// EKS Auth has refused one of its tokens.
    pub(super) fn refused(&mut self, address: IpAddr, begun_at: Timestamp, now: Timestamp, jitter: Jitter) {
        let Some(stranger) = self.0.get_mut(&address) else { return };
        if begun_at >= stranger.refused_at {
            (stranger.refusals, stranger.refused_at) = (stranger.refusals.saturating_add(1), now);
            stranger.until = now + freshness::pause_when_wanted(Failure::Refused, stranger.refusals, jitter);
        }
    }

    /// EKS Auth has taken one of its tokens.
    pub(super) fn accepted(&mut self, address: IpAddr) {
        let Some(stranger) = self.0.get_mut(&address) else { return };
        (stranger.refusals, stranger.until) = (0, Timestamp::MIN);
    }

    pub(super) fn clock_set_back(&mut self, by: SignedDuration) {
        for stranger in self.0.values_mut() {
            let moved = |at: Timestamp| at.checked_sub(by).unwrap_or(Timestamp::MIN);
            (stranger.until, stranger.refused_at) = (moved(stranger.until), moved(stranger.refused_at));
        }
    }
}

// === impl Stranger ===

impl Stranger {
    fn new() -> Self {
        Self { tokens: VecDeque::new(), refusals: 0, refused_at: Timestamp::MIN, until: Timestamp::MIN }
    }
}
