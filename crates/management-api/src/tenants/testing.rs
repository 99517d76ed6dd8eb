//! Rows of a tenant and its deployments for tests of this crate.

use super::{
    state::TenantEvent,
    store::{self, Deployment, Moved, NewDeployment, NewTenant},
};
use crate::identity::{Role, testing::TestDatabase};
use systemprompt_contract::{CheckoutId, DeploymentId, OperationId, Region, TenantId};
use systemprompt_oci::Digest;

/// A tenant that awaits its first deploy.
pub(crate) async fn tenant_row(database: &TestDatabase) -> TenantId {
    let account = database.account("ada@example.com", Role::Member).await.id;
    let (id, checkout) = (TenantId::new(), CheckoutId::new());
    sqlx::query(
        "INSERT INTO checkouts (id, account_id, price_id, plan_name, memory_mb, volume_gb, region, tenant_name)
         VALUES ($1, $2, 'p', 'Plan', 1, 1, 'iad', 't')",
    )
    .bind(checkout.uuid())
    .bind(account.uuid())
    .execute(database.db.pool())
    .await
    .unwrap();
    let name = "t".parse().unwrap();
    let operation = OperationId::new();
    let new = NewTenant { id, account, checkout, name: &name, region: Region::Iad, memory_mb: 1, operation };
    let mut tx = database.db.begin().await.unwrap();
    store::insert(&mut tx, &new).await.unwrap();
    store::insert(&mut tx, &new).await.unwrap();
    store::advance(&mut tx, id, TenantEvent::Ready, Moved::default()).await.unwrap();
    tx.commit().await.unwrap();
    id
}

/// A deploy that runs, its instance launched.
pub(crate) async fn ask(database: &TestDatabase, tenant: TenantId) -> Deployment {
    ask_for(database, tenant, &Digest::of(OperationId::new().to_string().as_bytes())).await
}

async fn ask_for(database: &TestDatabase, tenant: TenantId, digest: &Digest) -> Deployment {
    let (id, operation) = (DeploymentId::new(), OperationId::new());
    let key = id.to_string();
    let new = NewDeployment { id, tenant, image: "i", digest, operation, key: &key };
    let mut tx = database.db.begin().await.unwrap();
    store::insert_deployment(&mut tx, &new).await.unwrap();
    store::set_instance(&mut tx, id, Some(&key)).await.unwrap();
    let moved = Moved { operation: Some(operation), ..Moved::default() };
    store::advance(&mut tx, tenant, TenantEvent::DeployAsked, moved).await.unwrap();
    tx.commit().await.unwrap();
    store::deployment(database.db.pool(), id).await.unwrap().unwrap()
}

/// A deploy that has become the live release.
pub(crate) async fn release(database: &TestDatabase, tenant: TenantId) -> Deployment {
    let deployment = ask(database, tenant).await;
    make_live(database, tenant, &deployment).await;
    deployment
}

/// The same with this very image.
pub(crate) async fn release_image(database: &TestDatabase, tenant: TenantId, digest: &Digest) {
    let deployment = ask_for(database, tenant, digest).await;
    make_live(database, tenant, &deployment).await;
}

async fn make_live(database: &TestDatabase, tenant: TenantId, deployment: &Deployment) {
    let mut tx = database.db.begin().await.unwrap();
    store::make_live(&mut tx, tenant, deployment.id).await.unwrap();
    store::advance(&mut tx, tenant, TenantEvent::DeploySucceeded, Moved::default()).await.unwrap();
    tx.commit().await.unwrap();
}

/// The end of a deploy that did not make it.
pub(crate) async fn fail(database: &TestDatabase, tenant: TenantId, deployment: DeploymentId) {
    let release_is_live = store::live_deployment(database.db.pool(), tenant).await.unwrap().is_some();
    let mut tx = database.db.begin().await.unwrap();
    store::fail_deployment(&mut tx, deployment, "sick").await.unwrap();
    store::advance(&mut tx, tenant, TenantEvent::DeployFailed { release_is_live }, Moved::default()).await.unwrap();
    tx.commit().await.unwrap();
}
