//! Golden exchanges: the exact bytes of requests and responses, for every line of the contracts.

mod exchange;
mod session;
mod upstream;

use std::net::{IpAddr, Ipv4Addr};

use agent_common::net::POD_IDENTITY_V4;

use self::{
    exchange::{Caller, parse},
    session::Session,
};

/// The addresses to which podgate may have connections sent: one of its own, and EKS Pod Identity's.
const TARGETS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(169, 254, 175, 1)), IpAddr::V4(POD_IDENTITY_V4)];

/// Every exchange of a file must go as it is written there.
async fn check(file: &str, text: &str) {
    let wrong =
        futures::future::join_all(TARGETS.map(|target| not_as_written(file, text, target))).await.concat();
    assert!(wrong.is_empty(), "{}\n{} exchanges are not as written", wrong.join("\n"), wrong.len());
}

async fn not_as_written(file: &str, text: &str, target: IpAddr) -> Vec<String> {
    let mut session = Session::new(target);
    let mut wrong = Vec::new();
    let mut goes = true;
    let mut exchanges = parse(text)
        .into_iter()
        .filter(|exchange| {
            goes = exchange.goes_through(target).unwrap_or(goes);
            goes
        })
        .peekable();
    while let Some(exchange) = exchanges.next() {
        let goes_on = exchanges.peek().is_some_and(|next| matches!(next.caller, Caller::Again));
        let answer = session.run(&exchange, goes_on).await;
        if answer != exchange.answer {
            let (place, name) = (exchange.line, &exchange.name);
            let expected = exchange.answer;
            wrong.push(format!(
                "{file}:{place}: {name} ({target})\nexpected:\n{expected}\nanswered:\n{answer}"
            ));
        }
    }
    wrong
}

#[tokio::test(flavor = "multi_thread")]
async fn eks_pod_identity_is_exact_on_the_wire() {
    check("pod-identity.http", include_str!("pod-identity.http")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eks_auth_errors_are_exact_on_the_wire() {
    check("eks-auth.http", include_str!("eks-auth.http")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn imds_is_exact_on_the_wire() {
    check("imds.http", include_str!("imds.http")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ecs_is_exact_on_the_wire() {
    check("ecs.http", include_str!("ecs.http")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn framing_is_strict() {
    check("framing.http", include_str!("framing.http")).await;
}
