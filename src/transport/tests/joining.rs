//! A joiner learns where it belongs, or why not.

use super::*;

/// Asks `node` as member 4, and answers as the node would.
async fn ask(node: &mut Node, answer: Option<Introduction>) -> Result<Bytes, IntroduceError> {
    let (url, own_url) = (node.url.clone(), dead_url().await);
    let urls = vec![own_url.clone()];
    let asked = tokio::spawn(async move { introduce(4, &urls, &url).await });
    let wanted = |event| match event {
        Event::Introduce { id, urls, reply } => Some((id, urls, reply)),
        _ => None,
    };
    let (id, urls, reply) = node.event("a joiner", wanted).await;
    assert_eq!((id, urls), (4, vec![own_url]));
    match answer {
        Some(answer) => reply.send(answer).unwrap(),
        None => drop(reply),
    }
    asked.await.unwrap()
}

#[tokio::test]
async fn a_joiner_is_told_where_it_belongs_or_why_not() {
    let mut one = Node::alone(1).await;
    let body = Bytes::from_static(b"{\"cluster\":\"00c0ffee\"}");
    assert_eq!(ask(&mut one, Some(Introduction::Member { body: body.clone() })).await, Ok(body));
    let reason = "member 4 is not in the log: add it first";
    assert_eq!(
        ask(&mut one, Some(Introduction::NotAMember(reason.to_owned()))).await,
        Err(IntroduceError::NotAMember(reason.to_owned()))
    );
    assert_eq!(one.count("not-a-member"), 1);
    assert_eq!(ask(&mut one, Some(Introduction::Removed)).await, Err(IntroduceError::Removed));
    assert!(one.transport.status().is_empty(), "who asks is no peer yet");
    assert!(one.meetings.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_joiner_without_an_answer_may_ask_another_member() {
    let mut one = Node::alone(1).await;
    let huge = Introduction::Member { body: vec![b' '; (1 << 20) + 1].into() };
    for answer in [None, Some(huge)] {
        let error = ask(&mut one, answer).await.unwrap_err();
        assert!(matches!(&error, IntroduceError::Unreachable(text) if text.contains(&one.url.to_string())), "{error}");
    }
    // Another server than a member's says 403: that is no verdict.
    let (listener, stranger) = listen().await;
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.ok();
    });
    let asked = introduce(4, &[], &stranger).await;
    assert!(matches!(asked, Err(IntroduceError::Unreachable(_))), "{asked:?}");
    serving.await.unwrap();
    let nobody = dead_url().await;
    let error = introduce(4, &[], &nobody).await.unwrap_err();
    assert!(matches!(&error, IntroduceError::Unreachable(text) if text.contains(&nobody.to_string())), "{error}");
}

#[tokio::test]
async fn an_introduction_names_version_id_and_urls() {
    let mut one = Node::alone(1).await;
    for (query, version, urls, status, token) in [
        ("?id=4", "1", "http://a:1", 412, "version"),
        ("?id=4", "", "http://a:1", 400, "malformed"),
        ("?id=4", "2", "http://a:1/", 400, "malformed"),
        ("?id=0", "2", "http://a:1", 400, "malformed"),
        ("?id=+4", "2", "http://a:1", 400, "malformed"),
        ("?member=4", "2", "http://a:1", 400, "malformed"),
        ("", "2", "http://a:1", 400, "malformed"),
    ] {
        let request = Request::get(format!("{INTRODUCE}{query}"))
            .header("x-raft-version", version)
            .header("x-raft-peer-urls", urls)
            .body(Full::default())
            .unwrap();
        let response = call(&one.url, request).await;
        assert_eq!(
            (response.status().as_u16(), refusal(response.headers())),
            (status, token),
            "{query} {version} {urls}"
        );
    }
    assert!(one.is_silent(), "the node heard nothing");
}
