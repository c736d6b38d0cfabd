module {
  func.func @f0(%arg0: tensor<?x33xbf16> {moe.arg = "x"}, %arg1: tensor<?x33xbf16> {moe.arg = "y"}, %arg2: tensor<?x2xf32> {moe.arg = "weights"}, %arg3: tensor<?x2xi32> {moe.arg = "experts"}, %arg4: i1 {moe.arg = "accumulate"}, %arg5: !moe.weight<1x1x5x33xbf16, panel32> {moe.arg = "weight", moe.weight_index = 0 : i64}, %arg6: !moe.weight<5x2x7x33xbf16, panel32> {moe.arg = "weight", moe.weight_index = 1 : i64}, %arg7: !moe.weight<5x1x33x7xbf16, panel32> {moe.arg = "weight", moe.weight_index = 2 : i64}) -> (tensor<?x33xbf16>, tensor<?x2xf32>, tensor<?x2xi32>) attributes {moe.compute = bf16, moe.entry = "forward"} {
    %c2 = arith.constant 2 : index
    %weights, %experts = moe.router ins(%arg0, %arg5 : tensor<?x33xbf16>, !moe.weight<1x1x5x33xbf16, panel32>) outs(%arg2, %arg3 : tensor<?x2xf32>, tensor<?x2xi32>) #moe.router<score = softmax, order = score_then_select, top_k = 2, renormalize = sum> -> tensor<?x2xf32>, tensor<?x2xi32>
    %c0 = arith.constant 0 : index
    %dim = tensor.dim %arg0, %c0 : tensor<?x33xbf16>
    %0 = arith.muli %dim, %c2 : index
    %1 = tensor.empty() : tensor<6xi32>
    %2 = tensor.empty(%0) : tensor<?xi32>
    %offsets, %pair = moe.dispatch ins(%experts : tensor<?x2xi32>) experts = 5 outs(%1, %2 : tensor<6xi32>, tensor<?xi32>) -> tensor<6xi32>, tensor<?xi32>
    %3 = tensor.empty(%0) : tensor<?x33xbf16>
    %4 = moe.experts ins(%arg0, %offsets, %pair, %arg6, %arg7 : tensor<?x33xbf16>, tensor<6xi32>, tensor<?xi32>, !moe.weight<5x2x7x33xbf16, panel32>, !moe.weight<5x1x33x7xbf16, panel32>) slots %c2 outs(%3 : tensor<?x33xbf16>) #moe.expert<form = glu, activation = silu> -> tensor<?x33xbf16>
    %5 = moe.combine ins(%4, %offsets : tensor<?x33xbf16>, tensor<6xi32>) via(%pair, %weights slots %c2 : tensor<?xi32>, tensor<?x2xf32>) accumulate %arg4 outs(%arg1 : tensor<?x33xbf16>) -> tensor<?x33xbf16>
    return %5, %weights, %experts : tensor<?x33xbf16>, tensor<?x2xf32>, tensor<?x2xi32>
  }
  func.func @r0(%arg0: tensor<?x33xbf16> {moe.arg = "x"}, %arg1: tensor<?x2xf32> {moe.arg = "weights"}, %arg2: tensor<?x2xi32> {moe.arg = "experts"}, %arg3: tensor<?x5xf32> {moe.arg = "logits"}, %arg4: !moe.weight<1x1x5x33xbf16, panel32> {moe.arg = "weight", moe.weight_index = 0 : i64}) -> (tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x5xf32>) attributes {moe.compute = bf16, moe.entry = "route"} {
    %weights, %experts, %logits = moe.router ins(%arg0, %arg4 : tensor<?x33xbf16>, !moe.weight<1x1x5x33xbf16, panel32>) outs(%arg1, %arg2, %arg3 : tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x5xf32>) #moe.router<score = softmax, order = score_then_select, top_k = 2, renormalize = sum> -> tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x5xf32>
    return %weights, %experts, %logits : tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x5xf32>
  }
  func.func @e0(%arg0: tensor<?x33xbf16> {moe.arg = "x"}, %arg1: tensor<?x33xbf16> {moe.arg = "y"}, %arg2: tensor<?x?xf32> {moe.arg = "weights"}, %arg3: tensor<?x?xi32> {moe.arg = "experts"}, %arg4: i1 {moe.arg = "accumulate"}, %arg5: !moe.weight<5x2x7x33xbf16, panel32> {moe.arg = "weight", moe.weight_index = 1 : i64}, %arg6: !moe.weight<5x1x33x7xbf16, panel32> {moe.arg = "weight", moe.weight_index = 2 : i64}) -> tensor<?x33xbf16> attributes {moe.compute = bf16, moe.entry = "experts"} {
    %c1 = arith.constant 1 : index
    %dim = tensor.dim %arg3, %c1 : tensor<?x?xi32>
    %c0 = arith.constant 0 : index
    %dim_0 = tensor.dim %arg0, %c0 : tensor<?x33xbf16>
    %0 = arith.muli %dim_0, %dim : index
    %1 = tensor.empty() : tensor<6xi32>
    %2 = tensor.empty(%0) : tensor<?xi32>
    %offsets, %pair = moe.dispatch ins(%arg3 : tensor<?x?xi32>) experts = 5 outs(%1, %2 : tensor<6xi32>, tensor<?xi32>) -> tensor<6xi32>, tensor<?xi32>
    %3 = tensor.empty(%0) : tensor<?x33xbf16>
    %4 = moe.experts ins(%arg0, %offsets, %pair, %arg5, %arg6 : tensor<?x33xbf16>, tensor<6xi32>, tensor<?xi32>, !moe.weight<5x2x7x33xbf16, panel32>, !moe.weight<5x1x33x7xbf16, panel32>) slots %dim outs(%3 : tensor<?x33xbf16>) #moe.expert<form = glu, activation = silu> -> tensor<?x33xbf16>
    %5 = moe.combine ins(%4, %offsets : tensor<?x33xbf16>, tensor<6xi32>) via(%pair, %arg2 slots %dim : tensor<?xi32>, tensor<?x?xf32>) accumulate %arg4 outs(%arg1 : tensor<?x33xbf16>) -> tensor<?x33xbf16>
    return %5 : tensor<?x33xbf16>
  }
  moe.weight @L0.router : !moe.weight<1x1x5x33xbf16, panel32> role "router" from []
  moe.weight @L0.gate_up : !moe.weight<5x2x7x33xbf16, panel32> role "gate_up" from []
  moe.weight @L0.down : !moe.weight<5x1x33x7xbf16, panel32> role "down" from []
  moe.layer @L0 "model.layers.0.mlp" kind =  moe index = 0 compute = bf16 dims = <H = 33, F = 7, E = 5, K = 2> forward = @f0 route = @r0 experts = @e0 weights(@L0.router, @L0.gate_up, @L0.down)
  moe.weight @L1.router : !moe.weight<1x1x5x33xbf16, panel32> role "router" from []
  moe.weight @L1.gate_up : !moe.weight<5x2x7x33xbf16, panel32> role "gate_up" from []
  moe.weight @L1.down : !moe.weight<5x1x33x7xbf16, panel32> role "down" from []
  moe.layer @L1 "model.layers.1.mlp" kind =  moe index = 1 compute = bf16 dims = <H = 33, F = 7, E = 5, K = 2> forward = @f0 route = @r0 experts = @e0 weights(@L1.router, @L1.gate_up, @L1.down)
}
