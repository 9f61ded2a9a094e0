//! Golden exchanges: the very bytes of requests and of their answers, for every line of the contracts.

#[path = "golden/exchange.rs"]
mod exchange;
#[path = "golden/node.rs"]
mod node;

use self::{exchange::parse, node::Session};

/// Every exchange of a file must go as it is written there.
async fn check(file: &str, text: &str) {
    let mut session = Session::default();
    let mut wrong = Vec::new();
    for exchange in parse(text) {
        let answer = session.run(&exchange).await;
        if answer != exchange.answer {
            let (place, name) = (exchange.line, &exchange.name);
            let expected = exchange.answer;
            wrong.push(format!("{file}:{place}: {name}\nexpected:\n{expected}\nanswered:\n{answer}"));
        }
    }
    assert!(wrong.is_empty(), "{}\n{} exchanges are not as written", wrong.join("\n"), wrong.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn eks_pod_identity_is_exact_on_the_wire() {
    check("pod-identity.http", include_str!("golden/pod-identity.http")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_errors_of_eks_auth_are_exact_on_the_wire() {
    check("eks-auth.http", include_str!("golden/eks-auth.http")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn imds_is_exact_on_the_wire() {
    check("imds.http", include_str!("golden/imds.http")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ecs_is_exact_on_the_wire() {
    check("ecs.http", include_str!("golden/ecs.http")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn framing_is_strict() {
    check("framing.http", include_str!("golden/framing.http")).await;
}
