//! Tests of the queries.

use super::*;
use crate::{
    identity::testing::TestDatabase,
    tenants::testing::{ask, fail, release, tenant_row},
};

#[tokio::test]
async fn the_ten_newest_releases_keep_their_images() {
    let database = TestDatabase::start().await;
    let tenant = tenant_row(&database).await;
    let mut releases = Vec::new();
    for _ in 0..13 {
        releases.push(release(&database, tenant).await);
    }
    let mut kept: Vec<Digest> =
        kept_images(database.db.pool(), 10).await.unwrap().into_iter().map(|(_, digest)| digest).collect();
    let mut newest: Vec<Digest> = releases[3..].iter().map(|release| release.digest).collect();
    kept.sort();
    newest.sort();
    assert_eq!(kept, newest);
    let live = live_deployment(database.db.pool(), tenant).await.unwrap().unwrap();
    assert_eq!(live.id, releases[12].id);
    assert_eq!(recently_ended(database.db.pool(), 2).await.unwrap().len(), 2);
    assert_eq!(with_instance(database.db.pool()).await.unwrap(), [live.id]);
    // While an operation works on the tenant, what it replaces is its own business and no garbage.
    let asked = ask(&database, tenant).await;
    assert_eq!(with_instance(database.db.pool()).await.unwrap().len(), releases.len() + 1);
    // And what is live goes on being looked after.
    let serving = serving(database.db.pool()).await.unwrap();
    assert!(serving.len() == 1 && serving[0].serves(live.id) && !serving[0].serves(asked.id), "{serving:?}");
}

#[tokio::test]
async fn output_follows_what_is_live() {
    let database = TestDatabase::start().await;
    let (pool, tenant) = (database.db.pool(), tenant_row(&database).await);
    let shown = async || shown_deployment(pool, tenant).await.unwrap().map(|shown| shown.id);
    let next = async |before| next_deployment(pool, tenant, before).await.unwrap().map(|next| next.id);
    assert_eq!(shown().await, None);
    let first = ask(&database, tenant).await;
    fail(&database, tenant, first.id).await;
    assert_eq!(shown().await, Some(first.id), "nothing is live");
    let second = ask(&database, tenant).await;
    assert_eq!((shown().await, next(first.id).await), (Some(second.id), Some(second.id)));
    fail(&database, tenant, second.id).await;
    let live = release(&database, tenant).await;
    let sick = ask(&database, tenant).await;
    assert_eq!((shown().await, next(live.id).await), (Some(sick.id), None), "while its operation runs");
    fail(&database, tenant, sick.id).await;
    assert_eq!((shown().await, next(live.id).await), (Some(live.id), None), "a failed one takes no place");
    let [later, latest] = [release(&database, tenant).await, release(&database, tenant).await];
    assert_eq!((next(first.id).await, next(live.id).await), (Some(live.id), Some(later.id)), "none is left out");
    assert_eq!((next(later.id).await, shown().await), (Some(latest.id), Some(latest.id)));
    assert!(deployment_of(pool, TenantId::new(), live.id).await.unwrap().is_none());
}

#[tokio::test]
async fn an_end_is_counted_once() {
    let database = TestDatabase::start().await;
    let tenant = tenant_row(&database).await;
    let id = release(&database, tenant).await.id;
    let at = Utc::now();
    let note = async |at| note_exit(database.db.pool(), id, "exited with code 0", at).await.unwrap();
    assert_eq!((note(at).await, note(at).await), (Some(1), None));
    assert_eq!(note(at + chrono::TimeDelta::seconds(1)).await, Some(2));
}

#[tokio::test]
async fn a_phase_moves_only_as_the_machine_allows() {
    let database = TestDatabase::start().await;
    let tenant = tenant_row(&database).await;
    let mut tx = database.db.begin().await.unwrap();
    let refused = advance(&mut tx, tenant, TenantEvent::DeploySucceeded, Moved::default()).await;
    assert!(matches!(refused, Err(MoveError::Illegal(_))), "{refused:?}");
    let gone = advance(&mut tx, TenantId::new(), TenantEvent::Ready, Moved::default()).await;
    assert!(matches!(gone, Err(MoveError::Gone)), "{gone:?}");
}

#[tokio::test]
async fn the_database_derives_the_slug_that_the_contract_derives() {
    let database = TestDatabase::start().await;
    let id = tenant_row(&database).await;
    let slug: String = sqlx::query_scalar("SELECT slug FROM tenants").fetch_one(database.db.pool()).await.unwrap();
    assert_eq!(slug, id.slug().as_str());
}
