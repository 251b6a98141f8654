//! What a follower asks of the leader: writes and membership changes, and the two ways of having no answer.

use super::*;

#[tokio::test]
async fn a_forwarded_proposal_comes_back_with_its_position_or_a_rejection() {
    let (one, mut two) = pair().await;
    let id = |counter| RequestId { node: 1, boot: 1, counter };
    let sent = vec![(id(1), Bytes::from_static(b"a")), (id(2), Bytes::from(vec![1; 100_000]))];
    let asked = tokio::spawn(one.transport.propose(2, sent.clone()));
    let wanted = |event| match event {
        Event::Propose { from: 1, proposals, reply } => Some((proposals, reply)),
        _ => None,
    };
    let (proposals, reply) = two.event("proposals", wanted).await;
    assert_eq!(proposals, sent);
    let outcomes = vec![Ok(Position { term: 3, index: 9 }), Err(Rejection::DiskFull)];
    reply.send(outcomes.clone()).unwrap();
    assert_eq!(asked.await.unwrap(), Ok(outcomes));
    // The leader took it and will not say what became of it.
    let asked = tokio::spawn(one.transport.propose(2, sent));
    drop(two.event("proposals", wanted).await);
    assert!(matches!(asked.await.unwrap(), Err(ProposeError::Unknown(_))));
}

#[tokio::test]
async fn a_proposal_that_surely_did_not_arrive_says_so() {
    let (listener, url) = listen().await;
    let one = Node::start(1, 1, listener, &url, vec![member(2, &dead_url().await)]);
    let proposals = || vec![(RequestId { node: 1, boot: 1, counter: 1 }, Bytes::new())];
    for leader in [2, 3] {
        let outcome = one.transport.propose(leader, proposals()).await;
        assert!(matches!(outcome, Err(ProposeError::NotSent(_))), "leader {leader}: {outcome:?}");
    }
    // Nor does a leader take it that does not count us as a member.
    let two = Node::alone(2).await;
    two.verdicts.lock().unwrap().insert(1, Meeting::NotAMember);
    one.transport.set_peers(vec![member(2, &two.url)]);
    let outcome = one.transport.propose(2, proposals()).await;
    assert!(matches!(outcome, Err(ProposeError::NotSent(_))), "{outcome:?}");
}

/// A leader that dies with a proposal in hand: it may have appended it.
#[tokio::test]
async fn a_proposal_whose_answer_is_lost_is_unknown() {
    let (one, mut two) = pair().await;
    let proposals = vec![(RequestId { node: 1, boot: 1, counter: 1 }, Bytes::new())];
    let asked = tokio::spawn(one.transport.propose(2, proposals));
    let wanted = |event| if let Event::Propose { reply, .. } = event { Some(reply) } else { None };
    let _reply = two.event("proposals", wanted).await;
    two.transport.close().await;
    assert!(matches!(asked.await.unwrap(), Err(ProposeError::Unknown(_))));
}

#[tokio::test]
async fn a_membership_change_goes_to_the_leader_and_its_answer_comes_back() {
    let (one, mut two) = pair().await;
    let change = Bytes::from_static(b"{\"remove\":3}");
    let asked = tokio::spawn(one.transport.reconfigure(2, change.clone()));
    let wanted = |event| match event {
        Event::Reconfigure { from: 1, body, reply } => Some((body, reply)),
        _ => None,
    };
    let (body, reply) = two.event("a membership change", wanted).await;
    assert_eq!(body, change);
    let answer = Bytes::from_static(b"{\"refused\":\"unknown member\"}");
    reply.send(answer.clone()).unwrap();
    assert_eq!(asked.await.unwrap(), Ok(answer));
    // The leader took it and will not say what became of it; or what it says is longer than any answer.
    for answer in [None, Some(vec![0; RECONFIGURE_BYTES_MAX + 1])] {
        let asked = tokio::spawn(one.transport.reconfigure(2, change.clone()));
        let (_, reply) = two.event("a membership change", wanted).await;
        if let Some(answer) = answer {
            reply.send(answer.into()).unwrap();
        } else {
            drop(reply);
        }
        assert!(matches!(asked.await.unwrap(), Err(ProposeError::Unknown(_))));
    }
}

#[tokio::test]
async fn a_membership_change_that_surely_did_not_arrive_says_so() {
    let (one, two) = pair().await;
    one.transport.set_peers(vec![member(2, &two.url), member(3, &dead_url().await)]);
    for (leader, bytes) in [(2, RECONFIGURE_BYTES_MAX + 1), (3, 1), (4, 1)] {
        let outcome = one.transport.reconfigure(leader, vec![0; bytes].into()).await;
        assert!(matches!(outcome, Err(ProposeError::NotSent(_))), "leader {leader}: {outcome:?}");
    }
}
